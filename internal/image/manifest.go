package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// Media types that are told apart. Layers are told apart by their first bytes,
// since archives mislabel them.
const (
	typeOCIIndex       = "application/vnd.oci.image.index.v1+json"
	typeOCIManifest    = "application/vnd.oci.image.manifest.v1+json"
	typeOCIConfig      = "application/vnd.oci.image.config.v1+json"
	typeOCILayer       = "application/vnd.oci.image.layer.v1.tar"
	typeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	typeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
)

// guestOS is the only system that guests run; the architecture is the host's.
const guestOS = "linux"

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
	Variant      string `json:"variant,omitempty"`
}

func (p platform) String() string { return p.OS + "/" + p.Architecture }

// descriptor points at a blob. check has been called on every one in use.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	URLs        []string          `json:"urls,omitempty"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

func (d descriptor) digest() digest { return digest(d.Digest) }

func (d descriptor) check(what string, maxSize int64) error {
	if _, err := parseDigest(d.Digest); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if d.Size < 0 || d.Size > maxSize {
		return badImage("%s %s: size %d is not between 0 and %d", what, d.Digest, d.Size, maxSize)
	}
	return nil
}

// document is a manifest or an index: which one shows after parsing.
type document struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType,omitempty"`
	Config        *descriptor  `json:"config,omitempty"`
	Layers        []descriptor `json:"layers,omitempty"`
	Manifests     []descriptor `json:"manifests,omitempty"`
}

func (d *document) isIndex() bool { return d.Config == nil && len(d.Manifests) > 0 }

// parseDocument reads a manifest or an index and checks every descriptor.
func parseDocument(raw []byte, l limits) (*document, error) {
	var d document
	if err := decodeJSON(raw, l.manifest, &d); err != nil {
		return nil, badImage("manifest: %v", err)
	}
	if d.SchemaVersion != 2 {
		return nil, badImage("manifest has schema version %d, not 2", d.SchemaVersion)
	}
	if d.isIndex() {
		for _, m := range d.Manifests {
			if err := m.check("manifest", l.manifest); err != nil {
				return nil, err
			}
		}
		return &d, nil
	}
	return &d, d.checkManifest(l)
}

func (d *document) checkManifest(l limits) error {
	if d.Config == nil {
		return badImage("manifest names no configuration and no other manifest")
	}
	if len(d.Layers) > l.layers {
		return tooLarge("image has %d layers, more than %d", len(d.Layers), l.layers)
	}
	if err := d.Config.check("configuration", l.manifest); err != nil {
		return err
	}
	for _, y := range d.Layers {
		if err := y.check("layer", l.unpacked); err != nil {
			return err
		}
		if strings.Contains(y.MediaType, "nondistributable") || strings.Contains(y.MediaType, "foreign") {
			return badImage("layer %s is kept elsewhere (%s)", y.Digest, y.MediaType)
		}
		if strings.Contains(y.MediaType, "encrypted") {
			return badImage("layer %s is encrypted", y.Digest)
		}
	}
	return nil
}

// choose returns the manifest of an index that this host can run.
func (d *document) choose() (descriptor, error) {
	var have []string
	for _, m := range d.Manifests {
		if m.Platform == nil {
			if len(d.Manifests) == 1 {
				return m, nil
			}
			continue
		}
		if m.Platform.OS == guestOS && m.Platform.Architecture == runtime.GOARCH {
			return m, nil
		}
		if m.Platform.OS != "unknown" && len(have) < 20 {
			have = append(have, m.Platform.String())
		}
	}
	return descriptor{}, badImage("image has no variant for %s/%s, but for: %s", guestOS, runtime.GOARCH, strings.Join(have, ", "))
}

// configFile is the part of an image configuration that is used.
type configFile struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
	Config       struct {
		User       string            `json:"User,omitempty"`
		Env        []string          `json:"Env,omitempty"`
		Entrypoint []string          `json:"Entrypoint,omitempty"`
		Cmd        []string          `json:"Cmd,omitempty"`
		WorkingDir string            `json:"WorkingDir,omitempty"`
		Labels     map[string]string `json:"Labels,omitempty"`
		StopSignal string            `json:"StopSignal,omitempty"`
	} `json:"config"`
	RootFS struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
}

// parseConfig reads a configuration and checks that it belongs to a manifest
// with that many layers and that a guest of this host can run it.
func parseConfig(raw []byte, layers int, l limits) (*configFile, error) {
	var c configFile
	if err := decodeJSON(raw, l.manifest, &c); err != nil {
		return nil, badImage("configuration: %v", err)
	}
	if len(c.RootFS.DiffIDs) != layers {
		return nil, badImage("configuration names %d layers, the manifest %d", len(c.RootFS.DiffIDs), layers)
	}
	for _, id := range c.RootFS.DiffIDs {
		if _, err := parseDigest(id); err != nil {
			return nil, err
		}
	}
	have := platform{Architecture: c.Architecture, OS: c.OS}
	want := platform{Architecture: runtime.GOARCH, OS: guestOS}
	if have != want {
		return nil, badImage("image is for %.60q, this host runs %s", have, want)
	}
	return &c, nil
}

func (c *configFile) public() Config {
	return Config{
		Env: c.Config.Env, Cmd: c.Config.Cmd, Entrypoint: c.Config.Entrypoint,
		WorkingDir: c.Config.WorkingDir, User: c.Config.User,
		Labels: c.Config.Labels, StopSignal: c.Config.StopSignal,
	}
}

// decodeJSON decodes one value from foreign bytes: bounded, nothing after it.
func decodeJSON(raw []byte, maxSize int64, v any) error {
	if int64(len(raw)) > maxSize {
		return fmt.Errorf("%d bytes, more than %d", len(raw), maxSize)
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one JSON value")
	}
	return nil
}

// readBounded reads all of r unless it is longer than maxSize.
func readBounded(r io.Reader, maxSize int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxSize+1))
	if err == nil && int64(len(b)) > maxSize {
		err = fmt.Errorf("more than %d bytes", maxSize)
	}
	return b, err
}

// readBlob reads a small blob of the store.
func (s *Store) readBlob(d digest) ([]byte, error) {
	f, err := home.OpenFile(s.blobPath(d), unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readBounded(f, s.limits.manifest)
}

func badImage(format string, args ...any) error {
	return errdefs.New(errdefs.InvalidArgument, format, args...)
}
