"""The card fixes the folders; the import names differ: ``kernels/`` is installed as ``vit.kernels``.

A wheel with a top-level ``kernels`` would overwrite the Hugging Face package of that name.
"""

from setuptools import setup

setup(
    packages=["vit", "vit.kernels"],
    package_dir={"vit": "vit", "vit.kernels": "kernels"},
    package_data={"vit": ["assets/*"]},
)
