"""The shell that trains, measures, guards, reports and checkpoints one SAE or several under Lightning."""
