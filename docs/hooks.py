"""Hooks of the site (mkdocs.yml): its pages are those of this folder and of the top level, as they are."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGES.md": "CHANGES.md"}


def on_config(config):
    """The folder of the pages, which MkDocs does not take as a setting."""
    config.docs_dir = str(ROOT / "docs")
    return config


def on_files(files, config):
    """Files of the top level, which links of the pages lead to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text().replace("](docs/", "](")))
    files.append(File.generated(config, "CITATION.cff", abs_src_path=str(ROOT / "CITATION.cff")))
    return files


def on_page_markdown(markdown, **_):
    """Links from a page to the top level: it lies beside the page here."""
    return markdown.replace("](../CONTRIBUTING.md", "](CONTRIBUTING.md").replace("](../README.md", "](index.md")
