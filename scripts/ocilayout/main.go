// Command ocilayout turns a tar archive of a root file system on its standard
// input into an OCI image layout with one zstd layer. The same archive gives
// the same layout, byte for byte.
//
//	mmdebstrap bookworm - | ocilayout -out build/demo-image -tag demo:latest
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
)

const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar+zstd"
)

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type options struct {
	out        string
	tags, env  list
	cmd        list
	workdir    string
	epoch      int64
	labelTitle string
}

// list is a flag that may be given several times.
type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

func main() {
	var o options
	flag.StringVar(&o.out, "out", "", "directory of the layout; must not exist")
	flag.Var(&o.tags, "tag", "reference of the image (several allowed)")
	flag.Var(&o.env, "env", "environment of the image, NAME=VALUE (several allowed)")
	flag.Var(&o.cmd, "cmd", "default command, one argument each")
	flag.StringVar(&o.workdir, "workdir", "/", "working directory")
	flag.StringVar(&o.labelTitle, "title", "", "org.opencontainers.image.title")
	flag.Int64Var(&o.epoch, "epoch", 0, "creation time of the image, seconds since 1970")
	flag.Parse()
	if err := run(os.Stdin, o); err != nil {
		fmt.Fprintln(os.Stderr, "ocilayout:", err)
		os.Exit(1)
	}
}

func run(in io.Reader, o options) error {
	if o.out == "" || len(o.tags) == 0 {
		return errors.New("-out and -tag are required")
	}
	blobs := filepath.Join(o.out, "blobs", "sha256")
	if err := os.Mkdir(o.out, 0o755); err != nil {
		return err
	}
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		return err
	}
	layer, diffID, err := writeLayer(blobs, in)
	if err != nil {
		return fmt.Errorf("layer: %w", err)
	}
	config, err := writeJSON(blobs, typeConfig, configOf(o, diffID))
	if err != nil {
		return err
	}
	manifest, err := writeJSON(blobs, typeManifest, map[string]any{
		"schemaVersion": 2, "mediaType": typeManifest, "config": config, "layers": []descriptor{layer},
	})
	if err != nil {
		return err
	}
	if err := writeIndex(o, manifest); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(o.out, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}

func configOf(o options, diffID string) any {
	return map[string]any{
		"created":      time.Unix(o.epoch, 0).UTC().Format(time.RFC3339),
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config": map[string]any{
			"Env": o.env, "Cmd": o.cmd, "WorkingDir": o.workdir,
			"Labels": map[string]string{"org.opencontainers.image.title": o.labelTitle},
		},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{diffID}},
	}
}

// writeLayer compresses the archive and names it by its digest.
func writeLayer(blobs string, in io.Reader) (layer descriptor, diffID string, err error) {
	f, err := os.CreateTemp(blobs, "layer-*")
	if err != nil {
		return layer, "", err
	}
	defer f.Close()
	packed, plain := sha256.New(), sha256.New()
	z, err := zstd.NewWriter(io.MultiWriter(f, packed), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return layer, "", err
	}
	n, err := io.Copy(io.MultiWriter(z, plain), in)
	if err == nil && n == 0 {
		err = errors.New("archive is empty")
	}
	if err = errors.Join(err, z.Close(), f.Sync()); err != nil {
		return layer, "", err
	}
	fi, err := f.Stat()
	if err != nil {
		return layer, "", err
	}
	name := hex.EncodeToString(packed.Sum(nil))
	layer = descriptor{MediaType: typeLayer, Digest: "sha256:" + name, Size: fi.Size()}
	if err := errors.Join(f.Chmod(0o644), os.Rename(f.Name(), filepath.Join(blobs, name))); err != nil {
		return layer, "", err
	}
	return layer, "sha256:" + hex.EncodeToString(plain.Sum(nil)), nil
}

func writeJSON(blobs, mediaType string, v any) (descriptor, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return descriptor{}, err
	}
	sum := sha256.Sum256(raw)
	name := hex.EncodeToString(sum[:])
	d := descriptor{MediaType: mediaType, Digest: "sha256:" + name, Size: int64(len(raw))}
	return d, os.WriteFile(filepath.Join(blobs, name), raw, 0o644)
}

func writeIndex(o options, manifest descriptor) error {
	var entries []descriptor
	for _, tag := range o.tags {
		m := manifest
		m.Annotations = map[string]string{"org.opencontainers.image.ref.name": tag}
		entries = append(entries, m)
	}
	raw, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": typeIndex, "manifests": entries})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(o.out, "index.json"), raw, 0o644)
}
