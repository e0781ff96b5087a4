"""The commands of `vit`."""
