"""Packaging. The folders and the import names differ: ``kernels/`` is installed as ``vit.kernels``.

A wheel with a top-level ``kernels`` would overwrite the Hugging Face package of that name. The metadata is here and not
in pyproject.toml so that any setuptools from 64 on understands it: ``--no-build-isolation`` takes the one it finds.
"""

from pathlib import Path

from setuptools import setup

setup(
    name="fused-vit",
    version="0.1.0",
    description="Fused Triton kernels for Vision Transformers in PyTorch, forward and backward",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE", "vit/assets/LICENSE.txt"],
    python_requires=">=3.11",
    install_requires=["torch>=2.11", "triton>=3.6", "numpy"],
    extras_require={
        "demo": ["Pillow"],
        "hub": ["huggingface_hub", "safetensors"],
        "report": ["matplotlib"],
        "test": ["Pillow", "hypothesis", "pytest", "pytest-xdist", "ruff", "safetensors", "setuptools", "wheel"],
        "weights": ["safetensors"],
    },
    packages=["vit", "vit.adapters", "vit.kernels", "vit.weights"],
    package_dir={"vit": "vit", "vit.kernels": "kernels"},
    package_data={"vit": ["assets/*"]},
    entry_points={"console_scripts": ["vit = vit.cli:main"]},
)
