package qemu_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/powercut/writelog"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
	"github.com/microsandbox-go/microsandbox/internal/vmm/qemu"
)

// growSoakEnv is how many power cuts are looked at per volume. With it every kill
// is, too, without it some of them.
const growSoakEnv = "MSB_SOAK_GROW"

// logged puts QEMU's block driver blklogwrites on all disks of the next machines:
// a program in QEMU's place rewrites its arguments. The log of a disk is
// DIR/dN.log.
func logged(t *testing.T, dir string) {
	t.Helper()
	real, _, err := qemu.Find()
	need(t, "QEMU", err)
	script := filepath.Join(dir, "qemu")
	text := `#!/bin/bash
args=()
for a; do
	case $a in
	driver=raw,node-name=d*)
		node=${a#driver=raw,node-name=}
		node=${node%%,*}
		: >"` + dir + `/$node.log"
		args+=("${a/node-name=$node/node-name=below$node}" -blockdev
			"driver=blklogwrites,node-name=$node,discard=unmap,cache.no-flush=off,file=below$node,log.driver=file,log.filename=` + dir + `/$node.log")
		;;
	*) args+=("$a") ;;
	esac
done
exec ` + real + ` "${args[@]}"
`
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv(qemu.BinaryEnv, script)
}

// TestGrowKilledAtEveryStep takes the log of all that a guest writes to a volume
// while its file system grows, and looks at the volume as a kill of the machine
// leaves it after each write, and as a power cut does, which loses any of the
// writes since the last flush: e2fsck -p mends it by itself, e2fsck -fn finds
// nothing then, every file is as it was; and what a kill left grows to its end
// when it is mounted again.
func TestGrowKilledAtEveryStep(t *testing.T) {
	dir := storetest.Memory(t)
	// Blocks of 1 KiB, with more groups than descriptors are reserved for, and of
	// 4 KiB.
	vols := []*volume{newVolume(t, dir, "small", 2*mib), newVolume(t, dir, "large", 64*mib)}
	files := map[string]map[string][]byte{"small": contents("small", 20, 30<<10), "large": contents("large", 100, 100<<10)}
	g := bootVolumes(t, false, vols...)
	for name, tree := range files {
		g.fill("/"+name, tree)
	}
	g.stop()
	before := map[string]string{}
	for i, v := range vols {
		clean(t, v.path)
		v.lengthen(t, []int64{2300 * mib, 1000 * mib}[i])
		before[v.name] = v.path + ".before"
		copyImage(t, v.path, before[v.name])
	}
	t.Run("grow", func(t *testing.T) {
		logged(t, dir)
		bootVolumes(t, true, vols...).stop()
	})
	var samples []*volume
	for i, v := range vols {
		b, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("d%d.log", i)))
		if err != nil {
			t.Fatal(err)
		}
		log, err := writelog.Parse(b, v.to)
		if err != nil {
			t.Fatal(err)
		}
		if !v.full(t) {
			t.Errorf("%s has not grown", v.name)
		}
		r := &replay{t: t, v: v, base: before[v.name], log: log, files: files[v.name]}
		samples = append(samples, r.kills()...)
		r.powerCuts()
		r.liar()
		if t.Failed() {
			return
		}
	}
	for _, v := range growAll(t, samples, 5) {
		t.Errorf("%s does not grow any more", v.name)
	}
	for _, v := range samples {
		tree := files[strings.Split(v.name, "-")[0]]
		tree["new"] = []byte("text") // by growAll
		if err := (&replay{t: t}).compare(v, tree); err != nil {
			t.Errorf("%s: %v", v.name, err)
		}
	}
}

// contents are n files of up to size bytes.
func contents(name string, n, size int) map[string][]byte {
	files := map[string][]byte{}
	for i := range n {
		file := fmt.Sprintf("file%d", i)
		files[file] = pattern(1+i*size/n, name+file)
	}
	return files
}

// fill writes files into a directory of the guest.
func (g *guest) fill(dir string, files map[string][]byte) {
	g.t.Helper()
	for name, b := range files {
		if r := g.write(dir+"/"+name, string(b)); !r.OK {
			g.t.Fatalf("write %s: %s", name, *r.Error)
		}
	}
}

// replay makes the states of a volume that its log tells of.
type replay struct {
	t     *testing.T
	v     *volume
	base  string // the image before the log
	log   []writelog.Entry
	files map[string][]byte
}

// samplesPerVolume is how many states of each volume are mounted in the end: one
// machine has 22 disks.
const samplesPerVolume = 9

// kills looks at the volume after each entry of the log, every one of them in
// soak runs, and returns some of the states.
func (r *replay) kills() (samples []*volume) {
	t, every := r.t, max(1, len(r.log)/60)
	if os.Getenv(growSoakEnv) != "" {
		every = 1
	}
	now := r.base + ".now"
	copyImage(t, r.base, now)
	defer os.Remove(now)
	seen := 0
	for i := range r.log {
		apply(t, now, r.log[i:i+1])
		if (i+1)%every != 0 {
			continue
		}
		seen++
		state := &volume{name: fmt.Sprintf("%s-k%d", r.v.name, i), path: fmt.Sprintf("%s.%d", r.base, i), to: r.v.to}
		copyImage(t, now, state.path)
		if err := r.judge(state); err != nil {
			t.Errorf("%s: killed after write %d of %d: %v", r.v.name, i+1, len(r.log), err)
		}
		if len(samples) < seen*samplesPerVolume*every/len(r.log) {
			samples = append(samples, state)
			continue
		}
		os.Remove(state.path)
	}
	t.Logf("%s: %d states of %d after a kill", r.v.name, seen, len(r.log))
	return samples
}

// powerCuts looks at states in which some of the writes since the last flush are
// missing.
func (r *replay) powerCuts() {
	n := 60
	if v, err := strconv.Atoi(os.Getenv(growSoakEnv)); err == nil {
		n = v
	}
	lost := 0
	for _, end := range r.moments(n) {
		flushed := 0
		for i := range end {
			if r.log[i].Flush {
				flushed = i + 1
			}
		}
		dropped, err := r.cut(flushed, end)
		if err != nil {
			r.t.Errorf("%s: cut after write %d of %d, %d lost: %v", r.v.name, end, len(r.log), dropped, err)
		}
		lost += dropped
	}
	r.t.Logf("%s: %d power cuts, %d writes lost", r.v.name, n, lost)
}

// liar demands that a disk that keeps no flushed write either is found out: the
// power cuts above are able to fail.
func (r *replay) liar() {
	const n = 40
	for _, end := range r.moments(n) {
		if _, err := r.cut(0, end); err != nil {
			return
		}
	}
	r.t.Errorf("%s: %d power cuts of a disk that ignores flushes did no harm", r.v.name, n)
}

// moments are n places in the log.
func (r *replay) moments(n int) []int {
	at := make([]int, n)
	for i := range at {
		at[i] = 1 + rand.IntN(len(r.log))
	}
	return at
}

// cut judges the volume as it is when the entries before flushed are on the disk
// and a random part of those from there to end.
func (r *replay) cut(flushed, end int) (lost int, err error) {
	state := &volume{name: r.v.name, path: r.base + ".cut", to: r.v.to}
	copyImage(r.t, r.base, state.path)
	defer os.Remove(state.path)
	apply(r.t, state.path, r.log[:flushed])
	keep := rand.Float64()
	for i := flushed; i < end; i++ {
		if r.log[i].FUA && flushed > 0 || rand.Float64() < keep {
			apply(r.t, state.path, r.log[i:i+1])
		} else {
			lost++
		}
	}
	return lost, r.judge(state)
}

// judge does to a state what the next attachment does, and looks at it.
func (r *replay) judge(v *volume) error {
	var exit *exec.ExitError
	out, err := exec.Command("/usr/sbin/e2fsck", "-p", v.path).CombinedOutput()
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
		return fmt.Errorf("e2fsck -p: %w\n%s", err, out)
	}
	if out, err := exec.Command("/usr/sbin/e2fsck", "-fn", v.path).CombinedOutput(); err != nil {
		return fmt.Errorf("e2fsck -fn: %w\n%s", err, out)
	}
	return r.compare(v, r.files)
}

// compare demands that the files in the root of an image are these and no other.
func (r *replay) compare(v *volume, files map[string][]byte) error {
	out := r.t.TempDir()
	defer os.RemoveAll(out)
	if b, err := exec.Command("/usr/sbin/debugfs", "-R", "rdump / "+out, v.path).CombinedOutput(); err != nil {
		return fmt.Errorf("debugfs: %w\n%s", err, b)
	}
	_ = os.Remove(filepath.Join(out, "lost+found"))
	found, err := os.ReadDir(out)
	if err != nil || len(found) != len(files) {
		return fmt.Errorf("%d files of %d, %w", len(found), len(files), err)
	}
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(out, name)); err != nil || !bytes.Equal(got, want) {
			return fmt.Errorf("%s is damaged (%d bytes of %d, %w)", name, len(got), len(want), err)
		}
	}
	return nil
}

// apply does the writes of log entries to an image.
func apply(t *testing.T, path string, log []writelog.Entry) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, e := range log {
		switch {
		case e.Mark || e.Length == 0:
		case e.Discard || len(bytes.TrimLeft(e.Data, "\x00")) == 0:
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, e.Offset, e.Length)
		default:
			_, err = f.WriteAt(e.Data, e.Offset)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// copyImage copies an image with its holes.
func copyImage(t *testing.T, from, to string) {
	t.Helper()
	src, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	size, err := src.Seek(0, io.SeekEnd)
	for off := int64(0); err == nil && off < size; {
		var end int64
		if off, err = src.Seek(off, unix.SEEK_DATA); errors.Is(err, unix.ENXIO) {
			err = nil
			break
		}
		if end, err = src.Seek(off, unix.SEEK_HOLE); err == nil {
			_, err = io.Copy(io.NewOffsetWriter(dst, off), io.NewSectionReader(src, off, end-off))
		}
		off = end
	}
	if err := errors.Join(err, dst.Truncate(size)); err != nil {
		t.Fatal(err)
	}
}
