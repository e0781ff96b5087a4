"""The subcommands of `vit`."""
