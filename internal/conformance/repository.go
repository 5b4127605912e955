package conformance

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
)

// What WriteRepository makes.
const (
	RepositoryCommits = 200
	RepositoryFiles   = 2000 // in the last commit
)

// WriteRepository writes a history for git fast-import: each commit adds files
// in several directories and changes some of the older ones; there are
// executable files and symbolic links among them, and a tag.
func WriteRepository(w io.Writer) error {
	b := bufio.NewWriter(w)
	rng := rand.New(rand.NewPCG(3, 4))
	const perCommit = RepositoryFiles / RepositoryCommits
	for c := range RepositoryCommits {
		fmt.Fprintf(b, "commit refs/heads/main\ncommitter A U Thor <author@example.org> %d +0000\n", 1_600_000_000+c*60)
		fmt.Fprint(b, data(fmt.Sprintf("commit %d\n", c)))
		for f := c * perCommit; f < (c+1)*perCommit; f++ {
			fmt.Fprintf(b, "M %s inline %s\n%s", gitMode(f), gitPath(f), gitContent(rng, f))
		}
		for f := rng.IntN(100); f < c*perCommit; f += 400 {
			fmt.Fprintf(b, "M %s inline %s\n%s", gitMode(f), gitPath(f), gitContent(rng, f))
		}
	}
	fmt.Fprint(b, "tag v1\nfrom refs/heads/main\ntagger A U Thor <author@example.org> 1600100000 +0000\n", data("a tag\n"), "done\n")
	return b.Flush()
}

func gitPath(f int) string { return fmt.Sprintf("d%02d/sub%d/file%04d", f%40, f%3, f) }

func gitMode(f int) string {
	switch f % 50 {
	case 7:
		return "120000"
	case 11:
		return "100755"
	}
	return "100644"
}

func gitContent(rng *rand.Rand, f int) string {
	if gitMode(f) == "120000" {
		return data("../sub0/file" + fmt.Sprint(rng.IntN(RepositoryFiles)))
	}
	lines := ""
	for range 1 + rng.IntN(30) {
		lines += fmt.Sprintf("%d %016x\n", f, rng.Uint64())
	}
	return data(lines)
}

func data(s string) string { return fmt.Sprintf("data %d\n%s\n", len(s), s) }
