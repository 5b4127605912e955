package qemu

import (
	"bytes"
	"io"
	"os"
	"sync"
	"time"
)

// Limits of what is kept of a console or of QEMU's messages, in bytes.
const (
	maxLogged = 4 << 20
	tailSize  = 4 << 10
)

// tail copies what is written to it to a file, up to a limit that a guest
// cannot raise, and remembers the end.
type tail struct {
	mu     sync.Mutex
	file   *os.File // guarded by mu; nil: only the end is kept
	logged int      // guarded by mu
	last   []byte   // guarded by mu
}

// newTail duplicates f, which may be nil, so that the caller may close it.
func newTail(f *os.File) *tail {
	t := &tail{}
	if f != nil {
		if fd, err := dup(f); err == nil {
			t.file = os.NewFile(uintptr(fd), f.Name())
		}
	}
	return t
}

// Write never fails: a full disk must not stop the guest.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if room := maxLogged - t.logged; t.file != nil && room > 0 {
		_, _ = t.file.Write(p[:min(len(p), room)])
		if t.logged += len(p); t.logged >= maxLogged {
			_, _ = t.file.WriteString("\n[msb: what follows is not kept]\n")
		}
	}
	t.last = append(t.last, p...)
	if n := len(t.last) - tailSize; n > 0 {
		t.last = append(t.last[:0], t.last[n:]...)
	}
	return len(p), nil
}

// String returns the remembered end.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.last)
}

// lastLine returns the last line that is not empty and, if containing is not
// "", has it in it.
func (t *tail) lastLine(containing string) string {
	lines := bytes.Split([]byte(t.String()), []byte("\n"))
	for i := len(lines) - 1; i >= 0; i-- {
		line := bytes.TrimSpace(lines[i])
		if len(line) > 0 && bytes.Contains(line, []byte(containing)) {
			return printable(line)
		}
	}
	return ""
}

// printable keeps what is safe to show of bytes a guest may have chosen.
func printable(b []byte) string {
	return string(bytes.Map(func(r rune) rune {
		if r < ' ' && r != '\n' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == '\ufffd' {
			return -1
		}
		return r
	}, b))
}

func (t *tail) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.file != nil {
		t.file.Close()
		t.file = nil
	}
}

// drainTime bounds the wait for the rest of a console whose writer has ended
// but whose descriptor some other process has inherited.
const drainTime = time.Second

// copyConsole copies a console until its end.
func copyConsole(dst io.Writer, src *os.File, wg *sync.WaitGroup) {
	wg.Go(func() {
		buf := make([]byte, 4096)
		for {
			n, err := src.Read(buf)
			_, _ = dst.Write(buf[:n])
			if err != nil {
				return
			}
		}
	})
}
