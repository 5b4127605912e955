package image

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fetch"
)

// testRegistry is a registry on the loopback interface whose answers a test may
// change and count.
type testRegistry struct {
	*httptest.Server
	intercept func(w http.ResponseWriter, r *http.Request) bool // true: answered

	mu       sync.Mutex
	requests map[string]int // guarded by mu
	ranges   []string       // guarded by mu
}

func newRegistry(t testing.TB) *testRegistry {
	t.Helper()
	reg := &testRegistry{requests: map[string]int{}}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	reg.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reg.mu.Lock()
		reg.requests[r.Method+" "+r.URL.Path]++
		if h := r.Header.Get("Range"); h != "" {
			reg.ranges = append(reg.ranges, h)
		}
		reg.mu.Unlock()
		if reg.intercept != nil && reg.intercept(w, r) {
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(reg.Close)
	return reg
}

func (r *testRegistry) ref(name string) string {
	return strings.TrimPrefix(r.URL, "http://") + "/" + name
}

func (r *testRegistry) put(t testing.TB, method, path, contentType string, body []byte) {
	t.Helper()
	req, err := http.NewRequest(method, r.URL+path, strings.NewReader(string(body)))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		t.Fatalf("%s %s: %s", method, path, resp.Status)
	}
}

// push uploads an image and returns its reference.
func (r *testRegistry) push(t testing.TB, repo, tag string, im *testImage) string {
	t.Helper()
	for d, b := range im.blobs {
		if d != im.digest() {
			r.put(t, http.MethodPost, fmt.Sprintf("/v2/%s/blobs/uploads/?digest=%s", repo, d), "application/octet-stream", b)
		}
	}
	r.put(t, http.MethodPut, fmt.Sprintf("/v2/%s/manifests/%s", repo, im.digest()), typeOCIManifest, im.manifest)
	r.put(t, http.MethodPut, fmt.Sprintf("/v2/%s/manifests/%s", repo, tag), typeOCIManifest, im.manifest)
	return r.ref(repo + ":" + tag)
}

func (r *testRegistry) count(prefix string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for k, v := range r.requests {
		if strings.HasPrefix(k, prefix) {
			n += v
		}
	}
	return n
}

func layerDigest(t testing.TB, im *testImage, i int) digest {
	t.Helper()
	doc, err := parseDocument(im.manifest, defaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	return doc.Layers[i].digest()
}

func TestPull(t *testing.T) {
	reg, s, ctx := newRegistry(t), newStore(t), context.Background()
	im := makeImage(t, layerTar(t, file("a", "1")), layerTar(t, file("b", "2")))
	ref := reg.push(t, "team/app", "v1", im)
	var phases []Phase
	img, err := s.Pull(ctx, ref, PullOptions{Progress: func(p Progress) {
		if len(phases) == 0 || phases[len(phases)-1] != p.Phase {
			phases = append(phases, p.Phase)
		}
		if p.Total > 0 && p.Current > p.Total {
			t.Errorf("progress beyond the end: %+v", p)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	if img.Reference != ref || img.ManifestDigest != string(im.digest()) || len(img.Layers) != 2 {
		t.Errorf("Pull() = %+v", img)
	}
	if c := img.Config; c.WorkingDir != "/srv" || c.User != "app" || len(c.Cmd) != 1 || c.Cmd[0] != "sh" || len(c.Env) != 1 {
		t.Errorf("Config = %+v", c)
	}
	if got := fmt.Sprint(phases); got != "[resolving downloading indexing building done]" {
		t.Errorf("phases %v", got)
	}
	fsck(t, img.RootFS)

	// The second pull fetches the manifest only.
	before := reg.count("GET /v2/team/app/blobs/")
	if _, err := s.Pull(ctx, ref, PullOptions{}); err != nil {
		t.Fatal(err)
	}
	if n := reg.count("GET /v2/team/app/blobs/"); n != before {
		t.Errorf("%d blobs fetched again", n-before)
	}
	// By digest it is another reference of the same image.
	byDigest, err := s.Pull(ctx, reg.ref("team/app@"+string(im.digest())), PullOptions{})
	if err != nil || byDigest.RootFS != img.RootFS {
		t.Errorf("by digest: %+v, %v", byDigest, err)
	}
}

func TestPullChoosesPlatform(t *testing.T) {
	reg, s := newRegistry(t), newStore(t)
	mine := makeImage(t, layerTar(t, file("a", "1")))
	reg.push(t, "multi", "mine", mine)
	index := func(ps ...platform) []byte {
		doc := document{SchemaVersion: 2, MediaType: typeOCIIndex}
		for _, p := range ps {
			doc.Manifests = append(doc.Manifests, descriptor{MediaType: typeOCIManifest, Digest: string(mine.digest()), Size: int64(len(mine.manifest)), Platform: &p})
		}
		return mustJSON(t, doc)
	}
	host := platform{OS: guestOS, Architecture: runtime.GOARCH}
	reg.put(t, http.MethodPut, "/v2/multi/manifests/both", typeOCIIndex, index(platform{OS: "windows", Architecture: host.Architecture}, host))
	reg.put(t, http.MethodPut, "/v2/multi/manifests/other", typeOCIIndex, index(platform{OS: "linux", Architecture: "riscv64"}))
	img, err := s.Pull(context.Background(), reg.ref("multi:both"), PullOptions{})
	if err != nil || img.ManifestDigest != string(mine.digest()) {
		t.Errorf("Pull() = %+v, %v", img, err)
	}
	_, err = s.Pull(context.Background(), reg.ref("multi:other"), PullOptions{})
	if err == nil || !strings.Contains(err.Error(), "linux/riscv64") {
		t.Errorf("error %v does not name what there is", err)
	}
}

// A download that breaks off is continued where it was, by the same pull and by
// the next process.
func TestPullResumes(t *testing.T) {
	reg, s := newRegistry(t), newStore(t)
	im := makeImage(t, layerTar(t, file("big", noise(1<<20))))
	ref := reg.push(t, "app", "v1", im)
	blob := im.blobs[layerDigest(t, im, 0)]
	var broken atomic.Int32
	reg.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, string(layerDigest(t, im, 0))) {
			return false
		}
		var from int
		fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
		if from > 0 {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(blob)-1, len(blob)))
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)-from))
		if from > 0 {
			w.WriteHeader(http.StatusPartialContent)
		}
		if broken.Add(1) <= 2 { // a third each time, then the connection breaks
			_, _ = w.Write(blob[from : from+len(blob)/3])
			return true
		}
		_, _ = w.Write(blob[from:])
		return true
	}
	img, err := s.Pull(context.Background(), ref, PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	fsck(t, img.RootFS)
	if len(reg.ranges) != 2 {
		t.Errorf("ranges asked for: %q", reg.ranges)
	}

	// What another process left, with a wrong tail, is tried and then replaced.
	for name, left := range map[string][]byte{"half": blob[:len(blob)/2], "rotten": []byte("rotten"), "too long": append(blob[:len(blob):len(blob)], 'x')} {
		s2 := newStore(t)
		if err := s2.ensure(); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(s2.blobPath(layerDigest(t, im, 0))+partialSuffix, left, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s2.Pull(context.Background(), ref, PullOptions{}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPullRefuses(t *testing.T) {
	reg := newRegistry(t)
	im := makeImage(t, layerTar(t, file("a", "1")))
	ref := reg.push(t, "app", "v1", im)
	other := makeImageWith(t, configFile{OS: "windows", Architecture: "amd64"}, layerTar(t, file("a", "1")))
	deny := func(status int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path == "/v2/" {
				return false
			}
			w.WriteHeader(status)
			return true
		}
	}
	swap := func(path string, body []byte) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.URL.Path, path) {
				return false
			}
			_, _ = w.Write(body)
			return true
		}
	}
	blob := im.blobs[layerDigest(t, im, 0)]
	flipped := append([]byte{}, blob...)
	flipped[len(flipped)/2] ^= 1
	tests := map[string]struct {
		ref       string
		intercept func(http.ResponseWriter, *http.Request) bool
		kind      errdefs.Kind
		says      string
	}{
		"no such tag":         {reg.ref("app:nope"), nil, errdefs.ImageNotFound, "nope"},
		"no such repository":  {reg.ref("nope:v1"), nil, errdefs.ImageNotFound, "nope"},
		"bad reference":       {"UPPER CASE", nil, errdefs.InvalidArgument, "UPPER"},
		"nobody there":        {"127.0.0.1:1/app:v1", nil, errdefs.ImagePullFailed, "127.0.0.1:1"},
		"access refused":      {ref, deny(http.StatusForbidden), errdefs.ImagePullFailed, "refused access"},
		"manifest is garbage": {ref, swap("/manifests/v1", []byte("<html>")), errdefs.InvalidArgument, "manifest"},
		"manifest is huge":    {ref, swap("/manifests/v1", make([]byte, 5<<20)), errdefs.ImagePullFailed, "more than 4194304"},
		"digest mismatch":     {reg.ref("app@" + string(im.digest())), swap(string(im.digest()), []byte("{}")), errdefs.InvalidArgument, "digest"},
		"layer is changed":    {ref, swap(string(layerDigest(t, im, 0)), flipped), errdefs.InvalidArgument, "content has digest"},
		"layer is gone": {ref, func(w http.ResponseWriter, r *http.Request) bool {
			return strings.Contains(r.URL.Path, "/blobs/sha256") && deny(404)(w, r)
		}, errdefs.ImagePullFailed, "404"},
		"other platform": {reg.push(t, "win", "v1", other), nil, errdefs.InvalidArgument, "windows"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			reg.intercept = tt.intercept
			defer func() { reg.intercept = nil }()
			_, err := s.Pull(context.Background(), tt.ref, PullOptions{})
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("error %v, want one with %q", err, tt.says)
			}
			wantKind(t, err, tt.kind)
			if imgs, err := s.List(context.Background()); err != nil || len(imgs) != 0 {
				t.Errorf("after a refused pull: %d images, %v", len(imgs), err)
			}
			if left := unfinished(files(t, s)); len(left) > 0 {
				t.Errorf("left over: %q", left)
			}
		})
	}
}

// Many pulls of one image at a time fetch every blob once.
func TestPullShares(t *testing.T) {
	reg, s := newRegistry(t), newStore(t)
	im := makeImage(t, layerTar(t, file("big", noise(1<<20))), layerTar(t, file("b", "2")))
	ref := reg.push(t, "app", "v1", im)
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			// As other processes do it: a store of their own.
			other := &Store{dir: s.dir, tools: s.tools, limits: s.limits, free: s.free}
			if _, err := other.Pull(context.Background(), ref, PullOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for d := range im.blobs {
		if n := reg.count("GET /v2/app/blobs/" + string(d)); d != im.digest() && n != 1 {
			t.Errorf("blob %s fetched %d times", d, n)
		}
	}
	left, err := filepath.Glob(filepath.Join(s.dir, "*", "*", "*.partial"))
	if err != nil || len(left) > 0 {
		t.Errorf("left over: %q, %v", left, err)
	}
}

func TestPullAuth(t *testing.T) {
	reg, s := newRegistry(t), newStore(t)
	ref := reg.push(t, "app", "v1", makeImage(t, layerTar(t, file("a", "1"))))
	reg.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if u, p, _ := r.BasicAuth(); u == "ann" && p == "secret" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	t.Setenv("DOCKER_CONFIG", t.TempDir()) // nobody's own credentials
	_, err := s.Pull(context.Background(), ref, PullOptions{})
	wantKind(t, err, errdefs.ImagePullFailed)
	if _, err := s.Pull(context.Background(), ref, PullOptions{Auth: &fetch.Auth{Username: "ann", Password: "secret"}}); err != nil {
		t.Error(err)
	}
}

func TestPullForce(t *testing.T) {
	reg, s, ctx := newRegistry(t), newStore(t), context.Background()
	im := makeImage(t, layerTar(t, file("a", "1")))
	ref := reg.push(t, "app", "v1", im)
	img, err := s.Pull(ctx, ref, PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	rotten := s.blobPath(layerDigest(t, im, 0))
	if err := os.WriteFile(rotten, []byte("rot"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pull(ctx, ref, PullOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	if raw, err := os.ReadFile(rotten); err != nil || digestOf(raw) != layerDigest(t, im, 0) {
		t.Errorf("the damaged blob was kept (%v)", err)
	}
	fsck(t, img.RootFS)
}

func TestResolvePolicies(t *testing.T) {
	reg, s, ctx := newRegistry(t), newStore(t), context.Background()
	ref := reg.push(t, "app", "v1", makeImage(t, layerTar(t, file("a", "1"))))
	_, err := s.Resolve(ctx, ref, PullNever, PullOptions{})
	wantKind(t, err, errdefs.ImageNotFound)
	_, err = s.Resolve(ctx, ref, "sometimes", PullOptions{})
	wantKind(t, err, errdefs.InvalidConfig)
	first, err := s.Resolve(ctx, ref, "", PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	second := reg.push(t, "app", "v1", makeImage(t, layerTar(t, file("a", "2"))))
	for policy, moved := range map[string]bool{PullIfMissing: false, PullNever: false} {
		img, err := s.Resolve(ctx, second, policy, PullOptions{})
		if err != nil || (img.ManifestDigest != first.ManifestDigest) != moved {
			t.Errorf("%s: %v, %v", policy, img, err)
		}
	}
	img, err := s.Resolve(ctx, second, PullAlways, PullOptions{})
	if err != nil || img.ManifestDigest == first.ManifestDigest {
		t.Errorf("always: %v, %v", img, err)
	}
	if img.LastUsedAt.Before(img.CreatedAt) {
		t.Errorf("used at %v, created at %v", img.LastUsedAt, img.CreatedAt)
	}
	if img, err := s.Resolve(ctx, img.ManifestDigest, PullNever, PullOptions{}); err != nil || img.RootFS == "" {
		t.Errorf("by digest: %+v, %v", img, err)
	}
}
