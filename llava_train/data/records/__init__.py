"""Files of records -> samples: containers cut and read files, formats read records."""
