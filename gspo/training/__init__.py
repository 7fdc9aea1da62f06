"""One training run: settings, loop, record, checkpoints and alarms."""
