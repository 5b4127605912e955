package internal

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	docTest = regexp.MustCompile("`((?:Test|Example|Fuzz)[A-Za-z0-9_]+)`")
	docLink = regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
)

// TestDocsPointAtWhatExists demands that every test a document names and every
// file it links to is in the tree.
func TestDocsPointAtWhatExists(t *testing.T) {
	docs, err := filepath.Glob("../docs/*.md")
	if err != nil || len(docs) == 0 {
		t.Fatalf("no documents: %v", err)
	}
	tests := testNames(t)
	for _, doc := range append(docs, "../README.md", "../CHANGELOG.md") {
		b, err := os.ReadFile(doc)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range docTest.FindAllStringSubmatch(string(b), -1) {
			if !tests[m[1]] {
				t.Errorf("%s names the test %s, which is not in the tree", doc, m[1])
			}
		}
		for _, m := range docLink.FindAllStringSubmatch(string(b), -1) {
			target := filepath.Join(filepath.Dir(doc), strings.TrimSpace(m[1]))
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s: %v", doc, m[1], err)
			}
		}
	}
}

// TestClaimsNameTests demands that every row of the tables in the documents that
// promise something names a test, and so does every section.
func TestClaimsNameTests(t *testing.T) {
	for _, doc := range []string{"../docs/guarantees.md", "../docs/on-disk.md"} {
		b, err := os.ReadFile(doc)
		if err != nil {
			t.Fatal(err)
		}
		for _, section := range strings.Split(string(b), "\n## ")[1:] {
			title, body, _ := strings.Cut(section, "\n")
			if !docTest.MatchString(body) && title != "Not promised yet" {
				t.Errorf("%s: the section %q names no test", doc, title)
			}
		}
		rows := 0
		lines := strings.Split(string(b), "\n")
		for i, line := range lines {
			head := i+1 < len(lines) && strings.HasPrefix(lines[i+1], "|--")
			if !strings.HasPrefix(line, "| ") || head {
				continue
			}
			rows++
			if !docTest.MatchString(line) && !strings.Contains(line, "the same tests") {
				t.Errorf("%s: this row names no test: %s", doc, line)
			}
		}
		if rows == 0 {
			t.Errorf("%s has no table", doc)
		}
	}
}
