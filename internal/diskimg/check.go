package diskimg

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/confine"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// Limits bound one run of e2fsck. The zero value of a field means what fits the
// image's size.
type Limits struct {
	CPU    time.Duration // processor time, in whole seconds
	Wall   time.Duration // from start to end
	Memory int64         // address space in bytes
}

// forSize fills what is not set: checking a sound file system takes far less.
func (l Limits) forSize(size int64) Limits {
	gib := size >> 30
	if l.CPU == 0 {
		l.CPU = 60*time.Second + time.Duration(gib)*time.Second
	}
	if l.Wall == 0 {
		l.Wall = 2 * l.CPU
	}
	if l.Memory == 0 {
		l.Memory = 512*mib + size>>10
	}
	return l
}

// CheckExt4 runs e2fsck -p on an image that a guest has written: the journal is
// replayed and what can be mended without a decision is mended, then the image
// is synced. image must be open for writing, at path, and locked; nobody else may
// use it. The file never gets longer.
//
// e2fsck runs confined by msb (a program that serves "confine-exec"): it sees the
// image and its own libraries, has no network and no capability, and bounded
// processor time, memory, file size and wall time. It is killed when ctx ends or
// this process dies; e2fsck can be killed at any time and run again.
//
// Errors: Filesystem, with a hint, when the file system needs a decision or
// e2fsck ran into a limit; UnsupportedOperation without e2fsck or where the host
// cannot confine it; Cancelled; IO.
func CheckExt4(ctx context.Context, msb string, image *os.File, path string, limits Limits) error {
	e2fsck, err := findTool("e2fsck")
	if err != nil {
		return err
	}
	fi, err := image.Stat()
	if err != nil {
		return errdefs.Wrap(errdefs.IO, err, "disk image %s", path)
	}
	c := &check{image: image, path: path, size: fi.Size(), limits: limits.forSize(fi.Size())}
	if c.size < smallestImage {
		return c.damaged("it has %d bytes", c.size)
	}
	if err := c.run(ctx, msb, e2fsck); err != nil {
		return err
	}
	if err := image.Sync(); err != nil {
		return errdefs.Wrap(errdefs.IO, err, "sync disk image %s", path)
	}
	return nil
}

// smallestImage is less than the smallest ext4 has, in bytes, and more than
// what confined programs write before they begin: the size is their limit.
const smallestImage = 64 << 10

// check is one run of e2fsck.
type check struct {
	image  *os.File
	path   string
	size   int64
	limits Limits
	output tail
}

func (c *check) profile(e2fsck string) (confine.Profile, error) {
	id, err := IdentityOf(c.image)
	if err != nil {
		return confine.Profile{}, errdefs.Wrap(errdefs.IO, err, "disk image %s", c.path)
	}
	p, err := confine.Tool("e2fsck", e2fsck, confine.Bind{Source: c.path, Dev: id.Dev, Ino: id.Ino, Writable: true})
	p.Env = append(p.Env, "E2FSCK_CONFIG=/dev/null", "MKE2FS_CONFIG=/dev/null")
	p.Rlimits = append(p.Rlimits,
		confine.Rlimit{Resource: unix.RLIMIT_CPU, Max: uint64(c.limits.CPU / time.Second)},
		confine.Rlimit{Resource: unix.RLIMIT_AS, Max: uint64(c.limits.Memory)},
		confine.Rlimit{Resource: unix.RLIMIT_FSIZE, Max: uint64(c.size)})
	return p, err
}

// run starts e2fsck and waits for its end. The death signal of a child is sent
// when the thread that started it ends, so this goroutine keeps its thread.
func (c *check) run(ctx context.Context, msb, e2fsck string) error {
	p, err := c.profile(e2fsck)
	if err != nil {
		return err
	}
	l, err := confine.Prepare(msb, p, []string{"e2fsck", "-p", c.path}, nil)
	if err != nil {
		return err
	}
	defer l.Close()
	l.Cmd.Stdout, l.Cmd.Stderr = &c.output, &c.output
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	limited, cancel := context.WithTimeout(ctx, c.limits.Wall)
	defer cancel()
	if err := l.Cmd.Start(); err != nil {
		return errdefs.Wrap(errdefs.IO, err, "start e2fsck")
	}
	stop := context.AfterFunc(limited, func() { _ = l.Cmd.Process.Kill() })
	err = l.Cmd.Wait()
	stop()
	if _, failed := l.Outcome(); failed != nil && limited.Err() == nil {
		return errdefs.Wrap(errdefs.KindOf(failed), failed, "check disk image %s (%v)", c.path, err)
	}
	if ctx.Err() != nil {
		return errdefs.Wrap(errdefs.Cancelled, ctx.Err(), "check disk image %s", c.path)
	}
	return c.verdict(err, limited.Err() != nil)
}

// Bits of e2fsck's exit code (e2fsck(8)); 1 and 2 say that errors were mended.
const (
	leftErrors = 4
	opFailed   = 8
	badUsage   = 16
	cancelled  = 32
)

func (c *check) damaged(format string, args ...any) error {
	return errdefs.New(errdefs.Filesystem, "the file system in %s is damaged: %s", c.path, fmt.Sprintf(format, args...)).
		WithHint("keep a copy of %s, then decide by hand: e2fsck -f %s", c.path, c.path)
}

// verdict says what the end of e2fsck means.
func (c *check) verdict(err error, tooLong bool) error {
	var exit *exec.ExitError
	switch {
	case tooLong:
		return c.damaged("e2fsck was not done after %s", c.limits.Wall)
	case err == nil:
		return nil
	case !errors.As(err, &exit):
		return errdefs.Wrap(errdefs.IO, err, "e2fsck")
	case exit.ExitCode() < 0:
		return c.damaged("e2fsck ended by its limits (%s)", exit)
	case exit.ExitCode()&(leftErrors|opFailed|badUsage|cancelled) != 0:
		return c.damaged("%s", c.output.reason(c.path))
	}
	return nil
}

// tail keeps the end of what a program says; the rest is dropped.
type tail struct{ b []byte }

const tailSize = 8 << 10

var _ io.Writer = (*tail)(nil)

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p[max(0, len(p)-tailSize):]...)
	if len(t.b) > 2*tailSize {
		t.b = append(t.b[:0], t.b[len(t.b)-tailSize:]...)
	}
	return len(p), nil
}

// reason is why the image could not be opened, else the last thing said about
// it, without its path, as printable text: names in it are a guest's.
func (t *tail) reason(path string) string {
	said := ""
	for line := range bytes.Lines(t.b) {
		text := strings.TrimSpace(strings.TrimPrefix(string(line), path+":"))
		if why, ok := strings.CutSuffix(text, " while trying to open "+path); ok {
			said = strings.TrimPrefix(why, "e2fsck: ")
			break // advice follows
		}
		switch {
		case text == "", strings.HasPrefix(text, "(i.e., without"), strings.HasPrefix(text, "UNEXPECTED INCONSISTENCY"):
		default:
			said = text
		}
	}
	if said == "" {
		said = "e2fsck says no more"
	}
	q := fmt.Sprintf("%.200q", said)
	return q[1 : len(q)-1]
}
