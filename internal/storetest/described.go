package storetest

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// inBackticks finds the paths in the first cell of a row of docs/on-disk.md.
var inBackticks = regexp.MustCompile("`([^`]+)`")

// Described demands that every file of a home is in the table of
// docs/on-disk.md, and returns the paths of the table with what was found of
// them. What lies inside a path that ends in a slash is not looked at.
func Described(t testing.TB, home string) map[string]int {
	t.Helper()
	rows := describedPaths(t)
	found := map[string]int{}
	patterns := map[string]*regexp.Regexp{}
	parents := []*regexp.Regexp{}
	for _, row := range rows {
		found[row] = 0
		patterns[row] = regexp.MustCompile("^" + pattern(strings.TrimSuffix(row, "/")) + "$")
		for dir := filepath.Dir(strings.TrimSuffix(row, "/")); dir != "."; dir = filepath.Dir(dir) {
			parents = append(parents, regexp.MustCompile("^"+pattern(dir)+"$"))
		}
	}
	entries, err := os.ReadDir(home)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		top, err := filepath.EvalSymlinks(filepath.Join(home, e.Name())) // tests share what takes long to make
		if err != nil {
			t.Error(err)
			continue
		}
		err = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			rel := filepath.Join(e.Name(), strings.TrimPrefix(path, top))
			for row, p := range patterns {
				if p.MatchString(rel) {
					found[row]++
					if d.IsDir() && strings.HasSuffix(row, "/") {
						return fs.SkipDir
					}
					return err
				}
			}
			for _, p := range parents {
				if d.IsDir() && p.MatchString(rel) {
					return err
				}
			}
			t.Errorf("docs/on-disk.md does not describe %s", rel)
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	return found
}

// pattern is the regular expression of a path with placeholders.
func pattern(path string) string {
	p := regexp.QuoteMeta(path)
	for _, r := range [][2]string{
		{"DEV-INO", `[0-9a-f]+-[0-9a-f]+`}, {"NAME", `[A-Za-z0-9][^/]*`}, {"ID", `[0-9A-Z]{26}`}, {"HEX", `[0-9a-f]{64}`}, {"HASH", `[0-9a-z][0-9a-z-]*`}, {`\*`, `[^/]*`}, {"/00", "/[0-3][0-9a-f]"},
	} {
		p = strings.ReplaceAll(p, r[0], r[1])
	}
	return p
}

// describedPaths reads the table: the further names of a cell are in the
// directory of its first, those that begin with a dot are other endings of it.
func describedPaths(t testing.TB) (paths []string) {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil || dir == "/" {
			break
		}
	}
	doc, err := os.ReadFile(filepath.Join(dir, "docs", "on-disk.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(doc), "\n") {
		cells := strings.Split(line, "|")
		if len(cells) < 6 {
			continue
		}
		first := ""
		for _, m := range inBackticks.FindAllStringSubmatch(cells[1], -1) {
			name := m[1]
			switch {
			case first == "":
				first = name
			case strings.HasPrefix(name, ".") && filepath.Ext(first) != "" && !strings.HasPrefix(filepath.Base(first), "."):
				name = strings.TrimSuffix(first, filepath.Ext(first)) + name
			default:
				name = filepath.Join(filepath.Dir(first), name)
			}
			paths = append(paths, name)
		}
	}
	if len(paths) < 15 {
		t.Fatalf("docs/on-disk.md names only %q", paths)
	}
	return paths
}
