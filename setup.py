"""Packaging. The folders and the import names differ: ``kernels/`` is installed as ``vit.kernels``.

A wheel with a top-level ``kernels`` would overwrite the Hugging Face package of that name. In a clone the link
``vit/kernels`` stands for what a wheel installs there, so that imports, editors and mypy find it. The metadata is here
and not in pyproject.toml so that any setuptools from 64 on understands it: ``--no-build-isolation`` takes the one it
finds.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

setup(
    name="fused-vit",
    version=re.search(r'^__version__ = "(.+)"$', (ROOT / "vit/__init__.py").read_text(encoding="utf-8"), re.M)[1],
    description="Fused Triton kernels for Vision Transformers in PyTorch, forward and backward",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="fused-vit developers",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: MIT License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    license="MIT",
    license_files=["LICENSE", "vit/assets/LICENSE.txt"],
    python_requires=">=3.11",
    install_requires=["torch>=2.11", "triton>=3.6", "numpy"],
    extras_require={
        "demo": ["Pillow"],
        "figures": ["Pillow", "matplotlib"],
        "hub": ["huggingface_hub", "safetensors"],
        "report": ["matplotlib"],
        "test": [
            "Pillow",
            "hypothesis",
            "matplotlib",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "ruff",
            "safetensors",
            "setuptools",
            "wheel",
        ],
        "weights": ["safetensors"],
    },
    packages=[
        "vit",
        "vit.adapters",
        "vit.commands",
        "vit.experiments",
        "vit.kernels",
        "vit.testing",
        "vit.training",
        "vit.weights",
    ],
    package_dir={"vit": "vit", "vit.kernels": "kernels"},
    package_data={"vit": ["assets/*", "py.typed"]},
    entry_points={"console_scripts": ["vit = vit.commands.cli:main"]},
)
