"""Who runs the step: one process, DDP, DeepSpeed's ZeRO or FSDP2, behind one set of verbs (see `base`)."""
