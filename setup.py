"""Installs minidamage; the kernels travel as sources (csrc/) and are built at the first op call, not here."""
from setuptools import setup

PACKAGES = ["minidamage", "minidamage.ops", "minidamage.layers", "minidamage.models", "minidamage.data", "minidamage.metrics",
            "minidamage.evaluation", "minidamage.visualize"]

setup(
    name="minidamage",
    version="0.1.0",
    description="Surface-damage detection and segmentation: paper after paper, readable, fast, tested",
    license="MIT",
    python_requires=">=3.11",
    install_requires=["torch>=2.11", "numpy", "pillow", "ninja", "pybind11"],
    extras_require={"test": ["pytest"]},
    packages=[*PACKAGES, "minidamage.csrc"],
    package_dir={"minidamage": "minidamage", "minidamage.csrc": "csrc"},
    package_data={"minidamage.csrc": ["*.h", "*.cpp", "bindings/*.cpp", "cpu/*.cpp", "cuda/*.cu"]},
)
