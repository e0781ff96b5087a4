"""Experiments that put a measurement beside a sentence of the article (ViT, https://arxiv.org/abs/2010.11929)."""
