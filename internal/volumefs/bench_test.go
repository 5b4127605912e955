package volumefs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

func benchVolume(b *testing.B) *volume {
	v := newVolume(b, Options{Alive: func() error { return nil }})
	v.put("f", string(make([]byte, 4096)))
	return v
}

func BenchmarkRead4K(b *testing.B) {
	v := benchVolume(b)
	for b.Loop() {
		if _, err := v.Read(ctx, "f"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStat(b *testing.B) {
	v := benchVolume(b)
	for b.Loop() {
		if _, err := v.Stat(ctx, "f"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkExists(b *testing.B) {
	v := benchVolume(b)
	for b.Loop() {
		if _, err := v.Exists(ctx, "f"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOverwrite4K(b *testing.B) {
	v := benchVolume(b)
	data := make([]byte, 4096)
	for b.Loop() {
		if err := v.Write(ctx, "f", data, WriteOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPlainReplace4K does with plain calls what makes an overwrite atomic and
// safe, and nothing else: a new file, synced, renamed over the old one, which is
// closed.
func BenchmarkPlainReplace4K(b *testing.B) {
	data := make([]byte, 4096)
	path := filepath.Join(b.TempDir(), "f")
	noErr(b, os.WriteFile(path, data, 0o644))
	for b.Loop() {
		f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		noErr(b, err)
		_, err = f.Write(data)
		noErr(b, errors.Join(err, unix.Fdatasync(int(f.Fd())), os.Rename(path+".new", path), f.Close()))
	}
}

// BenchmarkOverwrite4KCounted is BenchmarkOverwrite4K with a ledger and a limit.
func BenchmarkOverwrite4KCounted(b *testing.B) {
	base := b.TempDir()
	for _, name := range []string{"vol", "scratch"} {
		noErr(b, os.Mkdir(filepath.Join(base, name), 0o755))
	}
	noErr(b, newBook(b, base).l.SetLimits(ledger.Limits{Bytes: 1 << 30, Inodes: 1 << 18}))
	f, done, err := openPair(base, Options{})
	noErr(b, err)
	defer done()
	data := make([]byte, 4096)
	for b.Loop() {
		noErr(b, f.Write(ctx, "f", data, WriteOptions{}))
	}
}

// BenchmarkRemoveAll1K removes a directory of 1000 files, with and without a ledger.
func BenchmarkRemoveAll1K(b *testing.B) {
	for _, counted := range []bool{false, true} {
		b.Run(fmt.Sprint("counted=", counted), func(b *testing.B) {
			base := b.TempDir()
			for _, name := range []string{"vol", "scratch"} {
				noErr(b, os.Mkdir(filepath.Join(base, name), 0o755))
			}
			newBook(b, base)
			f, done, err := openPair(base, Options{})
			noErr(b, err)
			defer done()
			if !counted {
				f.opts.Ledger = nil
			}
			for b.Loop() {
				b.StopTimer()
				for i := range 1000 {
					path := filepath.Join(base, "vol", "d", fmt.Sprint(i))
					noErr(b, os.MkdirAll(filepath.Dir(path), 0o755))
					noErr(b, os.WriteFile(path, nil, 0o644))
				}
				b.StartTimer()
				noErr(b, f.RemoveAll(ctx, "d"))
			}
		})
	}
}

func BenchmarkList10K(b *testing.B) {
	v := benchVolume(b)
	for i := range 10_000 {
		v.put(fmt.Sprintf("d/f%05d", i), "")
	}
	for b.Loop() {
		if l, err := v.List(ctx, "d"); err != nil || len(l) != 10_000 {
			b.Fatal(len(l), err)
		}
	}
}

const big = 256 << 20

func BenchmarkReadStream256M(b *testing.B) {
	v := benchVolume(b)
	v.put("big", string(make([]byte, big)))
	b.SetBytes(big)
	for b.Loop() {
		r, err := v.OpenRead(ctx, "big")
		if err != nil {
			b.Fatal(err)
		}
		for {
			c, err := r.Recv(ctx)
			if err != nil {
				b.Fatal(err)
			}
			if c == nil {
				break
			}
		}
		r.Close()
	}
}

func BenchmarkReadStreamWriteTo256M(b *testing.B) {
	v := benchVolume(b)
	v.put("big", string(make([]byte, big)))
	b.SetBytes(big)
	for b.Loop() {
		r, err := v.OpenRead(ctx, "big")
		if err != nil {
			b.Fatal(err)
		}
		if _, err := r.WriteTo(onlyWriter{io.Discard}); err != nil {
			b.Fatal(err)
		}
		r.Close()
	}
}

type onlyWriter struct{ io.Writer }

func BenchmarkReadWhole256M(b *testing.B) {
	v := benchVolume(b)
	v.put("big", string(make([]byte, big)))
	b.SetBytes(big)
	for b.Loop() {
		if _, err := v.Read(ctx, "big"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWriteStream256M(b *testing.B) {
	v := benchVolume(b)
	chunk := bytes.Repeat([]byte("x"), 1<<20)
	b.SetBytes(big)
	for b.Loop() {
		w, err := v.OpenWrite(ctx, "out", WriteOptions{})
		if err != nil {
			b.Fatal(err)
		}
		for range big / len(chunk) {
			if _, err := w.Write(chunk); err != nil {
				b.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCopy256M(b *testing.B) {
	v := benchVolume(b)
	v.put("big", string(make([]byte, big)))
	b.SetBytes(big)
	for b.Loop() {
		if err := v.Copy(ctx, "big", "copy", WriteOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}
