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
