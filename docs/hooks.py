"""The site has the files outside of docs/ that its pages link to: links that work in the repository work there too.

README.md is the first page, CHANGELOG.md and CONTRIBUTING.md are pages. Other files that a page links to, recipes for
example, are copied to files/.
"""

import re
from pathlib import Path
from posixpath import normpath

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)")


def site_path(link: str, folder: str) -> str:
    """Where a file lies on the site that a page in `folder` ("docs", or "" for the root) links to."""
    if "://" in link:
        return link
    path = normpath(f"{folder}/{link}" if folder else link)
    if path in PAGES:
        return PAGES[path]
    return path[len("docs/") :] if path.startswith("docs/") else f"files/{path}"


def linked(text: str, folder: str) -> str:
    """A page's text with its links as they must be on the site."""
    return LINK.sub(lambda found: site_path(found[1], folder), text)


def on_files(files, config):
    texts = [(page.read_text(encoding="utf-8"), "docs") for page in sorted((ROOT / "docs").glob("*.md"))]
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        texts.append((text, ""))
        files.append(File.generated(config, page, content=linked(text, "")))
    for text, folder in texts:
        for link in LINK.findall(text):
            place = site_path(link, folder)
            if place.startswith("files/") and not files.get_file_from_path(place):
                path = ROOT / place[len("files/") :]
                if path.is_file():  # mkdocs names the links that lead nowhere
                    files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    return markdown if page.file.src_uri in PAGES.values() else linked(markdown, "docs")
