package image

import (
	"time"
)

// Image is one image of the store, complete on disk.
type Image struct {
	// Reference is the short form of the name: no default registry, always
	// a tag or a digest ("demo:latest", "localhost:5000/app:v1").
	Reference string
	// ManifestDigest names the manifest of this platform, never an index of several.
	ManifestDigest string
	ConfigDigest   string
	Architecture   string
	OS             string
	Config         Config
	Layers         []Layer
	// SizeBytes is what the layers and the configuration take as blobs.
	SizeBytes  int64
	CreatedAt  time.Time // when the reference was pulled or loaded
	LastUsedAt time.Time // when a sandbox was last made from it; CreatedAt before that
	// RootFS is the path of the read-only ext4 image. It is set by Pull, Load
	// and Resolve; Get and List leave it empty when the file is not there.
	RootFS string

	meta *rootMeta // what was captured when RootFS was built; nil without RootFS
}

// Config is what an image says about running it.
type Config struct {
	Env        []string
	Cmd        []string
	Entrypoint []string
	WorkingDir string
	User       string
	Labels     map[string]string
	StopSignal string
}

// Layer is one layer, bottom first.
type Layer struct {
	DiffID         string // digest of the uncompressed tar
	BlobDigest     string // digest of the blob as stored
	MediaType      string
	CompressedSize int64 // bytes of the blob
	Position       int
}

// Progress is one report of a long operation. Reports of one operation come
// from one goroutine at a time.
type Progress struct {
	Phase   Phase
	Digest  string // the blob, or the image while its root file system is built
	Layer   int    // from 1; 0 where the report is about the whole image
	Layers  int
	Current int64 // bytes so far
	Total   int64 // bytes in all; 0 if unknown
}

// Phase is a step of pull or load.
type Phase string

// The phases, in order. A phase may be missing when there is nothing to do.
const (
	PhaseResolve  Phase = "resolving"
	PhaseDownload Phase = "downloading"
	PhaseLoad     Phase = "loading"
	PhaseIndex    Phase = "indexing"
	PhaseBuild    Phase = "building"
	PhaseDone     Phase = "done"
)
