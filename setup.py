"""Installs the packages and builds the one C++ module (pybind11)."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

setup(
    name="moelpr",
    version="0.1.0",
    packages=find_packages(include=["moelpr*", "data_tools*", "checkpoint_convert*"]),
    package_data={"moelpr.data": ["*.pyi", "csrc/*.cpp"]},
    ext_modules=[
        Pybind11Extension("moelpr.data._language_bits", ["moelpr/data/csrc/language_bits.cpp"], cxx_std=17),
    ],
)
