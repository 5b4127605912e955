package fetch_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/microsandbox-go/microsandbox/internal/fetch"
	"github.com/microsandbox-go/microsandbox/internal/fetch/fetcher"
)

// TestMain is msb-fetch, too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == fetch.Process {
		os.Exit(fetcher.Main(os.Args[2:]))
	}
	os.Exit(m.Run())
}

// both are the two implementations, which must not differ.
var both = map[string]fetch.Tools{"program": fetch.Program{Find: os.Executable}, "in process": fetcher.InProcess{}}

func compressed(t *testing.T, c fetch.Codec, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser = gzip.NewWriter(&out)
	if c == fetch.Zstd {
		z, err := zstd.NewWriter(&out)
		if err != nil {
			t.Fatal(err)
		}
		w = z
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestDecompress(t *testing.T) {
	want := bytes.Repeat([]byte("some content "), 100_000)
	for name, tools := range both {
		for _, c := range []fetch.Codec{fetch.Gzip, fetch.Zstd} {
			t.Run(name+" "+string(c), func(t *testing.T) {
				packed := compressed(t, c, want)
				if got, err := unpack(t.Context(), tools, c, bytes.NewReader(packed)); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
				for what, bad := range map[string][]byte{"cut": packed[:len(packed)-9], "garbage": []byte("none of this is compressed"), "empty": nil} {
					if c == fetch.Zstd && what == "empty" {
						continue // an empty sequence of frames
					}
					if _, err := unpack(t.Context(), tools, c, bytes.NewReader(bad)); err == nil {
						t.Errorf("%s: no error", what)
					}
				}
			})
		}
	}
}

func unpack(ctx context.Context, tools fetch.Tools, c fetch.Codec, r io.Reader) ([]byte, error) {
	z, err := tools.Decompress(ctx, c, r)
	if err != nil {
		return nil, err
	}
	defer z.Close()
	return io.ReadAll(z)
}

// TestDecompressGivenUp: neither an early Close nor the end of the context waits
// for the rest, and a file is passed on as it is.
func TestDecompressGivenUp(t *testing.T) {
	tools := both["program"]
	path := t.TempDir() + "/big"
	if err := os.WriteFile(path, compressed(t, fetch.Gzip, make([]byte, 64<<20)), 0o600); err != nil {
		t.Fatal(err)
	}
	for what, end := range map[string]func(z io.Closer, cancel func()) error{
		"closed":    func(z io.Closer, _ func()) error { return z.Close() },
		"cancelled": func(_ io.Closer, cancel func()) error { cancel(); return nil },
	} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		z, err := tools.Decompress(ctx, fetch.Gzip, f)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(z, make([]byte, 4096)); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if err := end(z, cancel); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := io.Copy(io.Discard, z); err == nil {
			t.Errorf("%s: read to the end", what)
		}
		cancel()
		z.Close()
		f.Close()
	}
}

// registryServer answers as a registry with one blob does.
func registryServer(t *testing.T, blob []byte) (reference string, hits func(string) int) {
	var mu sync.Mutex
	seen := map[string]int{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen[r.URL.Path]++
		mu.Unlock()
		switch r.URL.Path {
		case "/v2/":
		case "/v2/app/blobs/whole":
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(blob))
		case "/v2/app/blobs/cut":
			w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
			_, _ = w.Write(blob[:len(blob)/2])
		case "/v2/app/blobs/slow":
			w.WriteHeader(http.StatusOK)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		case "/v2/app/blobs/secret":
			w.WriteHeader(http.StatusForbidden)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://") + "/app:v1", func(path string) int {
		mu.Lock()
		defer mu.Unlock()
		return seen[path]
	}
}

func TestRegistry(t *testing.T) {
	blob := bytes.Repeat([]byte("0123456789"), 100_000)
	for name, tools := range both {
		t.Run(name, func(t *testing.T) {
			ref, hits := registryServer(t, blob)
			reg, err := tools.Dial(t.Context(), fetch.Access{Reference: ref})
			if err != nil {
				t.Fatal(err)
			}
			defer reg.Close()
			get := func(id string, off int64) ([]byte, int64, error) {
				resp, err := reg.Get(t.Context(), fetch.Request{Kind: "blobs", ID: id, Offset: off})
				if err != nil {
					return nil, 0, err
				}
				defer resp.Body.Close()
				b, err := io.ReadAll(resp.Body)
				return b, resp.Start, err
			}
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					if b, start, err := get("whole", 0); err != nil || start != 0 || !bytes.Equal(b, blob) {
						t.Errorf("whole: %d bytes from %d, %v", len(b), start, err)
					}
				})
			}
			wg.Wait()
			if n := hits("/v2/"); n != 1 {
				t.Errorf("the registry was asked %d times how it wants to be asked", n)
			}
			if b, start, err := get("whole", 999_990); err != nil || start != 999_990 || string(b) != "0123456789" {
				t.Errorf("the end: %q from %d, %v", b, start, err)
			}
			if b, _, err := get("cut", 0); err == nil || !strings.Contains(err.Error(), "EOF") || len(b) != len(blob)/2 {
				t.Errorf("cut: %d bytes, %v", len(b), err)
			}
			for id, status := range map[string]int{"secret": http.StatusForbidden, "none": http.StatusNotFound} {
				var e *fetch.Error
				if _, _, err := get(id, 0); !errors.As(err, &e) || e.Status != status {
					t.Errorf("%s: %v", id, err)
				}
			}
			if _, _, err := get("whole", 10_000_000); err == nil {
				t.Error("from beyond the end: no error")
			}
			ctx, cancel := context.WithCancel(t.Context())
			resp, err := reg.Get(ctx, fetch.Request{Kind: "blobs", ID: "slow"})
			if err != nil {
				t.Fatal(err)
			}
			cancel()
			if _, err := io.ReadAll(resp.Body); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled: %v", err)
			}
			resp.Body.Close()
		})
	}
}

// TestRegistryUnreachable: what fails before a request says what it was.
func TestRegistryUnreachable(t *testing.T) {
	for name, tools := range both {
		for stage, a := range map[string]fetch.Access{
			"registry 127.0.0.1:1": {Reference: "127.0.0.1:1/app"},
			"certificates":         {Reference: "127.0.0.1:1/app", CACerts: []byte("none")},
			"reference":            {Reference: "A B"},
		} {
			reg, err := tools.Dial(t.Context(), a)
			if err == nil {
				_, err = reg.Get(t.Context(), fetch.Request{Kind: "manifests", ID: "v1"})
				reg.Close()
			}
			var e *fetch.Error
			if !errors.As(err, &e) || e.Stage != stage {
				t.Errorf("%s, %s: %#v", name, stage, err)
			}
		}
	}
	_, err := both["program"].Dial(t.Context(), fetch.Access{CACerts: make([]byte, fetch.MaxAccess)})
	var e *fetch.Error
	if !errors.As(err, &e) || e.Stage != "certificates" {
		t.Errorf("too many certificates: %v", err)
	}
}

// FuzzAnswer: whatever the bytes, reading an answer ends.
func FuzzAnswer(f *testing.F) {
	var whole bytes.Buffer
	body := io.NopCloser(strings.NewReader("body"))
	if err := fetch.WriteAnswer(&whole, &fetch.Response{Start: 3, Body: body}, nil); err != nil {
		f.Fatal(err)
	}
	f.Add(whole.Bytes())
	line, _ := json.Marshal(map[string]any{"error": map[string]any{"message": "m"}})
	f.Add(append(line, '\n'))
	f.Add([]byte("{}\n\xff\xff\xff\xffbroken"))
	f.Add([]byte("{}\n\x00\x10\x00\x00short"))
	f.Fuzz(func(t *testing.T, b []byte) {
		resp, err := fetch.ReadAnswer(io.NopCloser(bytes.NewReader(b)))
		if err != nil {
			return
		}
		if got, _ := io.ReadAll(resp.Body); len(got) > len(b) {
			t.Errorf("%d bytes of %d", len(got), len(b))
		}
	})
}
