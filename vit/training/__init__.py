"""Training on one machine: data, loop, run folder and probe. The commands are in `vit.commands`."""
