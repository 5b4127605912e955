package internal

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// referenceCounts is how many ids of each prefix the reference has.
var referenceCounts = map[string]int{
	"SV": 5, "V": 11, "H": 15, "FS": 13, "VB": 7, "MB": 15, "NB": 9, "T": 54, "F": 7, "B": 70, "X": 14,
}

var (
	referenceRow  = regexp.MustCompile(`^\| ([A-Z]+)-([0-9]+) \|`)
	referenceTest = regexp.MustCompile("`((?:Test|Example|Fuzz)[A-Za-z0-9_]+)")
	testFunc      = regexp.MustCompile(`(?m)^func ((?:Test|Example|Fuzz)[A-Za-z0-9_]+)\(`)
)

// TestReferenceIsComplete demands that docs/reference.md names every id once,
// that every row has an honest state, and that every test it names is in the tree.
func TestReferenceIsComplete(t *testing.T) {
	f, err := os.Open("../docs/reference.md")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tests := testNames(t)
	count := map[string]int{}
	seen := map[string]bool{}
	states, told := map[string]int{}, ""
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if strings.HasPrefix(sc.Text(), "Of ") {
			told = sc.Text()
		}
		m := referenceRow.FindStringSubmatch(sc.Text())
		if m == nil {
			continue
		}
		id := m[1] + "-" + m[2]
		if seen[id] {
			t.Errorf("%s is listed twice", id)
		}
		seen[id] = true
		count[m[1]]++
		states[checkRow(t, id, sc.Text(), tests)]++
	}
	if want := fmt.Sprintf("Of %d ids, %d are done, %d partial, %d not yet.", len(seen), states["done"], states["partial"], states["not yet"]); told != want {
		t.Errorf("it says %q, want %q", told, want)
	}
	for prefix, want := range referenceCounts {
		if count[prefix] != want {
			t.Errorf("%d ids with prefix %s, want %d", count[prefix], prefix, want)
		}
		delete(count, prefix)
	}
	for prefix := range count {
		t.Errorf("ids with unknown prefix %s", prefix)
	}
}

// checkRow looks at the last two cells, tests and state, and returns which of the
// three states it is.
func checkRow(t *testing.T, id, row string, tests map[string]bool) (is string) {
	t.Helper()
	cells := strings.Split(strings.Trim(row, "| "), " | ")
	if len(cells) != 5 {
		t.Errorf("%s: %d cells, want id, name, Go form, tests, state", id, len(cells))
		return ""
	}
	state := strings.TrimSpace(cells[4])
	for _, s := range []string{"done", "partial", "not yet"} {
		if strings.HasPrefix(state, s) {
			is = s
		}
	}
	if is == "" {
		t.Errorf("%s: state %q is not done, partial or not yet", id, state)
	}
	if strings.HasPrefix(state, "partial") && !strings.Contains(state, ":") {
		t.Errorf("%s: partial without saying what is missing", id)
	}
	named := referenceTest.FindAllStringSubmatch(cells[3], -1)
	if strings.HasPrefix(state, "done") && len(named) == 0 {
		t.Errorf("%s: done without a test", id)
	}
	for _, n := range named {
		if !tests[n[1]] {
			t.Errorf("%s: test %s is not in the tree", id, n[1])
		}
	}
	return is
}

// testNames lists the tests, examples and fuzz targets of the tree.
func testNames(t *testing.T) map[string]bool {
	t.Helper()
	out, err := exec.Command("git", "ls-files", "--cached", "--others", "--exclude-standard", "..").Output()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, file := range strings.Fields(string(out)) {
		if !strings.HasSuffix(file, "_test.go") {
			continue
		}
		src, err := os.ReadFile(file)
		if err != nil {
			continue // deleted, not yet committed
		}
		for _, m := range testFunc.FindAllStringSubmatch(string(src), -1) {
			names[m[1]] = true
		}
	}
	return names
}
