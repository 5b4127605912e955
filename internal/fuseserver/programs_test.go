package fuseserver

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// shell runs a script in dir and fails the test with its output.
func shell(t *testing.T, dir, script string) string {
	t.Helper()
	cmd := exec.Command("sh", "-eu", "-c", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME="+dir, "GIT_CONFIG_NOSYSTEM=1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	return out.String()
}

func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			prereq.Missing(t, "%s", p)
		}
	}
}

// TestGitThroughKernel clones and checks a repository on the share.
func TestGitThroughKernel(t *testing.T) {
	need(t, "git")
	eachVirt(t, func(t *testing.T, virt string) {
		mnt, _ := mountShare(t, Config{StatVirt: virt, AsRoot: true})
		shell(t, mnt, `
			git init -q src; cd src
			git config user.email a@b; git config user.name n
			for i in $(seq 1 20); do
				mkdir -p d$i; for j in $(seq 1 20); do echo $i $j > d$i/f$j; done
				ln -s f1 d$i/link; chmod +x d$i/f2
				git add -A; git commit -qm c$i
			done
			cd ..; git clone -q --no-local src copy; cd copy
			git fsck --full --strict
			test -z "$(git status --porcelain)"
			test "$(readlink d3/link)" = f1; test -x d3/f2; test ! -x d3/f3`)
	})
}

// TestTarThroughKernel carries a tree with every kind of metadata onto the
// share and compares it with the original.
func TestTarThroughKernel(t *testing.T) {
	need(t, "tar", "setfattr", "getfattr", "find", "sha256sum")
	eachVirt(t, func(t *testing.T, virt string) {
		mnt, _ := mountShare(t, Config{StatVirt: virt, AsRoot: true})
		src := t.TempDir()
		shell(t, src, `
			for i in $(seq 1 100); do
				mkdir -p d$i; echo $i > d$i/file; ln -s ../d1/file d$i/sym; ln d$i/file d$i/hard
				chmod $((i % 8))$((i % 8))4 d$i/file; setfattr -n user.n -v $i d$i/file
				chown $i:$((i+1)) d$i/file
				test `+virt+` = relaxed || chown -h $((i+2)):$i d$i/sym
			done
			test `+virt+` = off || { chmod 4755 d7/file; chmod 2755 d8/file; }
			chmod 1777 d9; mkfifo d1/fifo; chown 5:6 d1/fifo
			dd if=/dev/zero of=sparse bs=1 count=0 seek=10M status=none
			touch -h -d '2001-02-03 04:05:06.789012345' d5/sym; touch -d '1969-01-01' d6/file`)
		shell(t, src, `tar --xattrs --sparse -cf - . | tar --xattrs -C `+mnt+` -xpf -`)
		digest := `
			find . -mindepth 1 ! -type d -printf '%p %y %m %U %G %s %n %T@ %l\n' | sort
			find . -mindepth 1 -type d -printf '%p %y %m %U %G\n' | sort
			find . -type f -print0 | sort -z | xargs -0 sha256sum
			getfattr -R -d . | sort`
		want, got := shell(t, src, digest), shell(t, mnt, digest)
		if want != got {
			w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
			for i := range min(len(w), len(g)) {
				if w[i] != g[i] {
					t.Errorf("want %s\n got %s", w[i], g[i])
				}
			}
			t.Fatalf("%d lines, want %d", len(g), len(w))
		}
		if out := shell(t, filepath.Join(mnt), `find . -type l | wc -l; rm -r d*; ls -A`); out != "100\nsparse\n" {
			t.Errorf("after removal: %q", out)
		}
	})
}
