"""What pyproject.toml cannot say: the recipes in configs/ are installed as mindska/configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mindska*"]), "mindska.configs"],
    package_dir={"mindska.configs": "configs"},
)
