package microsandbox

import (
	"context"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/fetch"
	"github.com/microsandbox-go/microsandbox/internal/image"
	"github.com/microsandbox-go/microsandbox/internal/records"
	"github.com/microsandbox-go/microsandbox/internal/sandbox"
)

// Image gives access to the images of this machine.
var Image imageFactory

type imageFactory struct{}

// ImageHandle describes one image as it was when the handle was made.
type ImageHandle struct{ img *image.Image }

// ImageDetail is a handle with the image's configuration and layers.
type ImageDetail struct {
	*ImageHandle
	Config *ImageConfig
	Layers []ImageLayer
}

// ImageConfig is what an image says about running it.
type ImageConfig struct {
	Digest     string // of the configuration itself
	Env        []string
	Cmd        []string
	Entrypoint []string
	WorkingDir string
	User       string
	Labels     map[string]string
	StopSignal string
}

// ImageLayer is one layer, position 0 at the bottom.
type ImageLayer struct {
	DiffID              string
	BlobDigest          string
	MediaType           string
	CompressedSizeBytes *int64
	ErofsSizeBytes      *int64 // always nil: an image has one root file system, not one for each layer
	Position            int32
}

// ImagePruneReport says what [imageFactory.Prune] removed. FsmetaRemoved
// counts root file systems; VMDKRemoved is always 0.
type ImagePruneReport struct {
	ImageRefsRemoved uint32
	ManifestsRemoved uint32
	LayersRemoved    uint32
	FsmetaRemoved    uint32
	VMDKRemoved      uint32
	BytesReclaimed   *uint64
}

// ImageArchiveFormat is a format that Save writes.
type ImageArchiveFormat string

// Archive formats. Load tells them apart by itself.
const (
	ImageArchiveDocker ImageArchiveFormat = "docker"
	ImageArchiveOCI    ImageArchiveFormat = "oci"
)

// ImageProgress is one report of a pull or a load.
type ImageProgress struct {
	Phase   string // resolving, downloading, loading, indexing, building, done
	Digest  string // the blob, or the image while its root file system is built
	Layer   int    // from 1; 0 where the report is about the whole image
	Layers  int
	Current int64 // bytes so far
	Total   int64 // bytes in all; 0 if unknown
}

// ImagePullOptions say how to pull. The zero value uses the credentials of the
// user's docker configuration and TLS, except for registries on the loopback
// interface and on private networks.
type ImagePullOptions struct {
	Insecure bool                // plain http and unverified certificates are allowed
	Auth     *RegistryAuth       // nil: as configured for docker
	CACerts  []byte              // PEM; certificate authorities trusted besides the system's
	Force    bool                // check all files again that are here, and fetch what is damaged
	Progress func(ImageProgress) // called often; must return quickly
}

// ImageLoadOptions say how to load an archive.
type ImageLoadOptions struct {
	Tags     []string            // names instead of those in the archive, which must hold one image
	Progress func(ImageProgress) // called often; must return quickly
}

// Pull fetches an image for this host's architecture from its registry, checks
// every digest and makes its root file system. What is here already is not
// fetched again; a download that broke off is continued.
//
// After a crash, or when it fails, the reference is as it was before. Errors:
// kinds ErrInvalidArgument (the reference, or an image that breaks a limit),
// ErrImageNotFound, ErrImagePullFailed.
func (imageFactory) Pull(ctx context.Context, reference string, o ImagePullOptions) (*ImageHandle, error) {
	st, err := imageStore()
	if err != nil {
		return nil, toPublic(err)
	}
	in := image.PullOptions{Insecure: o.Insecure, CACerts: o.CACerts, Force: o.Force, Progress: imageProgress(o.Progress)}
	if o.Auth != nil {
		in.Auth = &fetch.Auth{Username: o.Auth.Username, Password: o.Auth.Password}
	}
	img, err := st.Pull(ctx, reference, in)
	if err != nil {
		return nil, toPublic(err)
	}
	return &ImageHandle{img}, nil
}

// Get returns the image of a reference, or of a manifest digest. Errors: kind
// ErrImageNotFound.
func (imageFactory) Get(ctx context.Context, reference string) (*ImageHandle, error) {
	st, err := imageStore()
	if err != nil {
		return nil, toPublic(err)
	}
	img, err := st.Get(ctx, reference)
	if err != nil {
		return nil, toPublic(err)
	}
	return &ImageHandle{img}, nil
}

// List returns all images, newest first.
func (imageFactory) List(ctx context.Context) ([]*ImageHandle, error) {
	st, err := imageStore()
	if err != nil {
		return nil, toPublic(err)
	}
	imgs, err := st.List(ctx)
	return imageHandles(imgs), toPublic(err)
}

// Inspect returns an image with its configuration and layers. Errors: kind
// ErrImageNotFound.
func (f imageFactory) Inspect(ctx context.Context, reference string) (*ImageDetail, error) {
	h, err := f.Get(ctx, reference)
	if err != nil {
		return nil, err
	}
	return h.detail(), nil
}

// Remove drops a reference and the files that only it needed. The last
// reference of an image that sandboxes use is refused unless force is set; then
// its root file system stays as long as they use it.
//
// Errors: kinds ErrImageNotFound, ErrImageInUse (the message names the sandboxes).
func (imageFactory) Remove(ctx context.Context, reference string, force bool) error {
	st, err := imageStoreWithUsers(ctx)
	if err != nil {
		return toPublic(err)
	}
	return toPublic(st.Remove(ctx, reference, force))
}

// Prune removes every image that no sandbox uses, and all files that nothing
// needs.
func (imageFactory) Prune(ctx context.Context) (*ImagePruneReport, error) {
	st, err := imageStoreWithUsers(ctx)
	if err != nil {
		return nil, toPublic(err)
	}
	r, err := st.Prune(ctx)
	if err != nil {
		return nil, toPublic(err)
	}
	freed := uint64(r.Bytes)
	return &ImagePruneReport{
		ImageRefsRemoved: uint32(r.References), ManifestsRemoved: uint32(r.Manifests),
		LayersRemoved: uint32(r.Layers), FsmetaRemoved: uint32(r.Roots), BytesReclaimed: &freed,
	}, nil
}

// Load reads images from an OCI layout (a directory or a tar archive) or a
// docker archive. tags, if given, replace the names in the archive, which must
// then hold one image.
//
// Errors: kinds ErrPathNotFound, ErrInvalidArgument.
func (f imageFactory) Load(ctx context.Context, inputPath string, tags ...string) ([]*ImageHandle, error) {
	return f.LoadWith(ctx, inputPath, ImageLoadOptions{Tags: tags})
}

// LoadWith is Load with options.
func (imageFactory) LoadWith(ctx context.Context, inputPath string, o ImageLoadOptions) ([]*ImageHandle, error) {
	st, err := imageStore()
	if err != nil {
		return nil, toPublic(err)
	}
	imgs, err := st.Load(ctx, inputPath, o.Tags, imageProgress(o.Progress))
	return imageHandles(imgs), toPublic(err)
}

// Save writes images with their names into a tar archive that Load, and other
// tools, read. The archive is complete or absent.
//
// Errors: kinds ErrImageNotFound, ErrInvalidArgument, and ErrUnsupportedOperation
// for the docker format.
func (imageFactory) Save(ctx context.Context, references []string, outputPath string, format ImageArchiveFormat) error {
	if format != ImageArchiveOCI {
		return &Error{
			Kind: ErrUnsupportedOperation, Message: "save: format " + string(format) + " is not written yet",
			Hint: "use the oci format; docker load reads it too",
		}
	}
	st, err := imageStore()
	if err != nil {
		return toPublic(err)
	}
	return toPublic(st.Save(ctx, references, outputPath))
}

// Reference is the short form of the name: without a default registry, with a
// tag or a digest.
func (h *ImageHandle) Reference() string { return h.img.Reference }

// ManifestDigest names the manifest for this host's architecture.
func (h *ImageHandle) ManifestDigest() string { return h.img.ManifestDigest }

// Architecture is the architecture in Go's words (amd64, arm64).
func (h *ImageHandle) Architecture() string { return h.img.Architecture }

// OS is the operating system, "linux".
func (h *ImageHandle) OS() string { return h.img.OS }

// LayerCount is the number of layers.
func (h *ImageHandle) LayerCount() uint { return uint(len(h.img.Layers)) }

// SizeBytes is what the layers and the configuration take in compressed form;
// nil for a damaged image.
func (h *ImageHandle) SizeBytes() *int64 {
	if h.img.ConfigDigest == "" {
		return nil
	}
	size := h.img.SizeBytes
	return &size
}

// CreatedAt is when the reference was pulled or loaded.
func (h *ImageHandle) CreatedAt() time.Time { return h.img.CreatedAt }

// LastUsedAt is when a sandbox was last made from it; CreatedAt before that.
func (h *ImageHandle) LastUsedAt() time.Time { return h.img.LastUsedAt }

// Remove drops the reference as [imageFactory.Remove] does.
func (h *ImageHandle) Remove(ctx context.Context, force bool) error {
	return Image.Remove(ctx, h.Reference(), force)
}

// Inspect returns the image's configuration and layers as they are now.
func (h *ImageHandle) Inspect(ctx context.Context) (*ImageDetail, error) {
	return Image.Inspect(ctx, h.Reference())
}

func (h *ImageHandle) detail() *ImageDetail {
	c := h.img.Config
	d := &ImageDetail{ImageHandle: h, Config: &ImageConfig{
		Digest: h.img.ConfigDigest, Env: c.Env, Cmd: c.Cmd, Entrypoint: c.Entrypoint,
		WorkingDir: c.WorkingDir, User: c.User, Labels: c.Labels, StopSignal: c.StopSignal,
	}}
	for _, y := range h.img.Layers {
		size := y.CompressedSize
		d.Layers = append(d.Layers, ImageLayer{
			DiffID: y.DiffID, BlobDigest: y.BlobDigest, MediaType: y.MediaType,
			CompressedSizeBytes: &size, Position: int32(y.Position),
		})
	}
	return d
}

func imageHandles(imgs []*image.Image) []*ImageHandle {
	out := make([]*ImageHandle, 0, len(imgs))
	for _, i := range imgs {
		out = append(out, &ImageHandle{i})
	}
	return out
}

func imageProgress(fn func(ImageProgress)) func(image.Progress) {
	if fn == nil {
		return nil
	}
	return func(p image.Progress) {
		fn(ImageProgress{Phase: string(p.Phase), Digest: p.Digest, Layer: p.Layer, Layers: p.Layers, Current: p.Current, Total: p.Total})
	}
}

func imageStore() (*image.Store, error) {
	b, err := localBackend()
	if err != nil {
		return nil, err
	}
	return sandbox.Images(b.home), nil
}

// imageStoreWithUsers returns a store that knows which images sandboxes use. A
// sandbox that is being made may not know its digest yet: its reference counts.
func imageStoreWithUsers(ctx context.Context) (*image.Store, error) {
	b, err := localBackend()
	if err != nil {
		return nil, err
	}
	st := sandbox.Images(b.home)
	infos, _, err := sandbox.New(b.home).List(ctx, records.SandboxFilter{})
	if err != nil {
		return nil, err
	}
	users := map[string][]string{}
	for _, i := range infos {
		digest := i.Config.Digest
		if digest == "" {
			if img, err := st.Get(ctx, i.Image); err == nil {
				digest = img.ManifestDigest
			}
		}
		users[digest] = append(users[digest], i.Name)
	}
	st.Users = func(digest string) []string { return users[digest] }
	return st, nil
}
