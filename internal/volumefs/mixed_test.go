package volumefs

import (
	"bytes"
	"io"
	"testing"
)

// TestMixedReading: whatever reads after some calls of Recv goes on where the
// last chunk ended.
func TestMixedReading(t *testing.T) {
	v := newVolume(t, Options{})
	want := make([]byte, 9*ChunkSize+100)
	for i := range want {
		want[i] = byte(i * 7 >> 3)
	}
	v.put("f", string(want))
	rests := map[string]func(*ReadStream) ([]byte, error){
		"collect": func(r *ReadStream) ([]byte, error) { return r.Collect(ctx) },
		"read":    func(r *ReadStream) ([]byte, error) { return io.ReadAll(onlyReader{r}) },
		"write to": func(r *ReadStream) ([]byte, error) {
			var b bytes.Buffer
			_, err := r.WriteTo(&b)
			return b.Bytes(), err
		},
		"recv": func(r *ReadStream) (all []byte, err error) {
			for {
				b, err := r.Recv(ctx)
				if err != nil || b == nil {
					return all, err
				}
				if len(b) != ChunkSize && len(b) != len(want)%ChunkSize {
					t.Errorf("a chunk of %d bytes", len(b))
				}
				all = append(all, b...)
			}
		},
	}
	for name, rest := range rests {
		for chunks := range 11 {
			r, err := v.OpenRead(ctx, "f")
			noErr(t, err)
			var got []byte
			for range chunks {
				b, err := r.Recv(ctx)
				noErr(t, err)
				got = append(got, b...)
			}
			tail, err := rest(r)
			noErr(t, err)
			if got = append(got, tail...); !bytes.Equal(got, want) {
				t.Errorf("%s after %d chunks: %d bytes, want %d, or others", name, chunks, len(got), len(want))
			}
			noErr(t, r.Close())
		}
	}
}
