"""Packaging for llmbook: everything that varies stands in settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser()
config.read(here / "settings.ini", encoding="utf-8")
book = config["DEFAULT"]
hub, studio, dev = (book[f"{extra}_requirements"].split() for extra in ("hub", "studio", "dev"))

setup(
    name=book["lib_name"],
    version=book["version"],
    description=book["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=book["author"],
    author_email=book["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=book["keywords"],
    packages=find_packages(include=["llmbook", "llmbook.*"]),
    package_data={"llmbook": book["package_data"].split()},
    python_requires=">=" + book["min_python"],
    install_requires=book["requirements"].split(),
    extras_require={"hub": hub, "studio": studio, "dev": hub + studio + dev},
    entry_points={"console_scripts": book["console_scripts"].split(), "nbdev": ["llmbook=llmbook._modidx:d"]},
    zip_safe=False,
)
