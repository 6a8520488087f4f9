"""The data scripts, against servers and data made on the spot; nothing leaves this machine."""
