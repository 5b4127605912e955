package volumefs

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

func TestReadStream(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
		data = append(data, 'x')
		v.put("f", string(data))
		s, err := v.OpenRead(ctx, "f")
		noErr(t, err)
		var sizes []int
		var all []byte
		for {
			b, err := s.Recv(ctx)
			noErr(t, err)
			if b == nil {
				break
			}
			sizes, all = append(sizes, len(b)), append(all, b...)
		}
		if len(sizes) != 17 || sizes[0] != ChunkSize || sizes[16] != 1 || !bytes.Equal(all, data) {
			t.Errorf("chunks %v", sizes)
		}
		if b, err := s.Recv(ctx); b != nil || err != nil {
			t.Errorf("after the end: %d bytes, %v", len(b), err)
		}
		noErr(t, s.Close())
		noErr(t, s.Close())
		_, err = s.Recv(ctx)
		wantErr(t, err, os.ErrClosed)

		s, err = v.OpenRead(ctx, "f")
		noErr(t, err)
		_, err = s.Recv(ctx)
		noErr(t, err)
		rest, err := s.Collect(ctx)
		if err != nil || !bytes.Equal(rest, data[ChunkSize:]) {
			t.Errorf("collect: %d bytes, %v", len(rest), err)
		}
		noErr(t, s.Close())

		s, err = v.OpenRead(ctx, "f")
		noErr(t, err)
		var buf bytes.Buffer
		if n, err := io.Copy(&buf, s); err != nil || n != int64(len(data)) || !bytes.Equal(buf.Bytes(), data) {
			t.Errorf("copy: %d bytes, %v", n, err)
		}
		noErr(t, s.Close())

		v.put("empty", "")
		s, err = v.OpenRead(ctx, "empty")
		noErr(t, err)
		if b, err := s.Recv(ctx); b != nil || err != nil {
			t.Errorf("empty: %v, %v", b, err)
		}
		noErr(t, s.Close())
	})
}

func TestWriteStream(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		v.put("old", "old")
		w, err := v.OpenWrite(ctx, "new/dir/f", WriteOptions{})
		noErr(t, err)
		for _, chunk := range []string{"one ", "two ", "three"} {
			_, err := io.WriteString(w, chunk)
			noErr(t, err)
		}
		if ok, _ := v.Exists(ctx, "new"); ok {
			t.Error("a parent is there before Close")
		}
		noErr(t, w.Close())
		noErr(t, w.Close())
		_, err = w.Write([]byte("x"))
		wantErr(t, err, os.ErrClosed)
		if v.content("new/dir/f") != "one two three" {
			t.Errorf("content %q", v.content("new/dir/f"))
		}

		w, err = v.OpenWrite(ctx, "old", WriteOptions{})
		noErr(t, err)
		n, err := w.ReadFrom(strings.NewReader(strings.Repeat("x", writeback+1)))
		if n != writeback+1 || err != nil {
			t.Errorf("ReadFrom = %d, %v", n, err)
		}
		w.Abort()
		noErr(t, w.Close())

		cancelled, cancel := context.WithCancel(ctx)
		w, err = v.OpenWrite(cancelled, "old", WriteOptions{})
		noErr(t, err)
		_, err = w.Write([]byte("half"))
		noErr(t, err)
		cancel()
		wantErr(t, w.Close(), context.Canceled)
		if v.content("old") != "old" {
			t.Errorf("old is %q", v.content("old"))
		}
	})
}

// TestAlive: a volume that is gone is the only answer, whatever happened.
func TestAlive(t *testing.T) {
	gone := errdefs.New(errdefs.VolumeNotFound, "volume \"v\" not found")
	var alive error
	v := newVolume(t, Options{Alive: func() error { return alive }})
	v.put("f", "x")
	r, err := v.OpenRead(ctx, "f")
	noErr(t, err)
	w, err := v.OpenWrite(ctx, "g", WriteOptions{})
	noErr(t, err)
	alive = gone
	_, readErr := v.Read(ctx, "f")
	_, missErr := v.Read(ctx, "none")
	_, listErr := v.List(ctx, "")
	_, statErr := v.Stat(ctx, "f")
	_, existsErr := v.Exists(ctx, "f")
	_, recvErr := r.Recv(ctx)
	for i, err := range []error{readErr, missErr, listErr, statErr, existsErr, recvErr, w.Close(), v.Write(ctx, "f", nil, WriteOptions{}),
		v.Mkdir(ctx, "d"), v.Remove(ctx, "f"), v.RemoveDir(ctx, "d"), v.RemoveAll(ctx, "x"),
		v.Copy(ctx, "a", "b", WriteOptions{}), v.Rename(ctx, "a", "b", WriteOptions{})} {
		if !errdefs.Is(err, errdefs.VolumeNotFound) {
			t.Errorf("call %d: %v", i, err)
		}
	}
	noErr(t, r.Close())
}

func TestCancelled(t *testing.T) {
	v := newVolume(t, Options{})
	done, cancel := context.WithCancel(ctx)
	cancel()
	wantErr(t, v.Write(done, "f", nil, WriteOptions{}), context.Canceled)
	wantErr(t, v.Mkdir(done, "d"), context.Canceled)
	if got := v.tree(); len(got) != 0 {
		t.Errorf("tree %q", got)
	}
}

// TestScratch: while a file is replaced its temporary is never in the volume,
// and what a killed writer left elsewhere is collected.
func TestScratch(t *testing.T) {
	scratchDir := t.TempDir()
	scratch, err := os.Open(scratchDir)
	noErr(t, err)
	t.Cleanup(func() { scratch.Close() })
	left := filepath.Join(scratchDir, tempName())
	noErr(t, os.WriteFile(left, nil, 0o600))
	v := newVolume(t, Options{Scratch: scratch})
	if _, err := os.Stat(left); err != nil {
		t.Error("a young temporary was collected")
	}
	v.put("f", "old")
	noErr(t, v.Write(ctx, "f", []byte("new"), WriteOptions{}))
	if v.content("f") != "new" {
		t.Error("not replaced")
	}
	if names := listTree(t, scratchDir); len(names) != 1 {
		t.Errorf("scratch has %q", names)
	}
}
