"""The check of Markdown links finds each kind of broken link and accepts the others."""

import subprocess

from tests.links import broken_links

PAGE = """# A page of *its* `own`

[file](sub/other.md), [folder](sub), [heading](sub/other.md#one-two), [second of a name](sub/other.md#one-two-1),
[own](#a-page-of-its-own), [web](https://example.org/nowhere), [mail](mailto:a@example.org), [`code`](other%20name.md)
and `[no link](nowhere.md)`.

```
[no link](nowhere.md)
```

Line 10: [file](sub/none.md)

| a table |
|---|
| ![picture](none.png) |

[heading](sub/other.md#three), [own heading](#none), [by reference][page], [outside](../outside.md)

[page]: none.md
"""


def test_broken_links_are_named_by_file_and_line(tmp_path):
    root = tmp_path / "project"
    (root / "sub").mkdir(parents=True)
    (root / "page.md").write_text(PAGE)
    (root / "other name.md").touch()
    (root / "sub" / "other.md").write_text("# One: two?\n\n## One two\n\n[up](../page.md) [down](none/)\n")
    (tmp_path / "outside.md").touch()
    (root / "ignored").mkdir()
    (root / "ignored" / "page.md").write_text("[file](none.md)\n")
    (root / ".gitignore").write_text("ignored/\n")
    subprocess.run(["git", "init", "-q", root], check=True)
    assert sorted(broken_links(root)) == [
        "page.md:11: sub/none.md: no such file in the project",
        "page.md:15: none.png: no such file in the project",
        "page.md:17: #none: no such heading",
        "page.md:17: ../outside.md: no such file in the project",
        "page.md:17: none.md: no such file in the project",
        "page.md:17: sub/other.md#three: no such heading",
        "sub/other.md:5: none/: no such file in the project",
    ]
