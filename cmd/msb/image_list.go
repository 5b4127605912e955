package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

// imageRow is an image in msb image ls --format json.
type imageRow struct {
	Reference    string  `json:"reference"`
	Digest       string  `json:"digest"`
	SizeBytes    *int64  `json:"size_bytes"`
	Architecture string  `json:"architecture"`
	OS           string  `json:"os"`
	LayerCount   uint    `json:"layer_count"`
	CreatedAt    *string `json:"created_at"`
}

func newImageRow(i *microsandbox.ImageHandle) imageRow {
	return imageRow{
		Reference: i.Reference(), Digest: i.ManifestDigest(), SizeBytes: i.SizeBytes(),
		Architecture: i.Architecture(), OS: i.OS(), LayerCount: i.LayerCount(), CreatedAt: jsonTime(i.CreatedAt()),
	}
}

func newImageListCmd() *cobra.Command {
	var quiet bool
	var format outputFormat
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"},
		Short: "List images, newest first",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			imgs, err := microsandbox.Image.List(cmd.Context())
			if err != nil {
				return err
			}
			switch {
			case format == formatJSON:
				rows := make([]imageRow, 0, len(imgs))
				for _, i := range imgs {
					rows = append(rows, newImageRow(i))
				}
				return printJSON(cmd.OutOrStdout(), rows)
			case quiet:
				printReferences(cmd, false, imgs...)
				return nil
			case len(imgs) == 0:
				fmt.Fprintln(cmd.ErrOrStderr(), "No images found.")
				return nil
			}
			return printImages(cmd.OutOrStdout(), imgs)
		},
	}
	formatFlag(cmd, &format)
	quietFlag(cmd, &quiet, "only references")
	return cmd
}

func printImages(w io.Writer, imgs []*microsandbox.ImageHandle) error {
	t := newTable(w, "REFERENCE", "DIGEST", "SIZE", "LAYERS", "CREATED")
	for _, i := range imgs {
		size := "damaged"
		if n := i.SizeBytes(); n != nil {
			size = formatBytes(uint64(*n))
		}
		t.row(i.Reference(), shortDigest(i.ManifestDigest()), size, strconv.Itoa(int(i.LayerCount())), formatTime(i.CreatedAt()))
	}
	return t.flush()
}

// shortDigest keeps 12 digits, enough to tell images apart.
func shortDigest(d string) string {
	d = strings.TrimPrefix(d, "sha256:")
	return d[:min(12, len(d))]
}

// imageDetail is an image in msb image inspect --format json.
type imageDetail struct {
	imageRow
	Config imageConfigRow  `json:"config"`
	Layers []imageLayerRow `json:"layers"`
}

type imageConfigRow struct {
	Digest     string            `json:"digest"`
	Env        []string          `json:"env"`
	Cmd        []string          `json:"cmd"`
	Entrypoint []string          `json:"entrypoint"`
	WorkingDir string            `json:"working_dir"`
	User       string            `json:"user"`
	Labels     map[string]string `json:"labels"`
	StopSignal string            `json:"stop_signal"`
}

type imageLayerRow struct {
	DiffID              string `json:"diff_id"`
	BlobDigest          string `json:"blob_digest"`
	MediaType           string `json:"media_type"`
	CompressedSizeBytes *int64 `json:"compressed_size_bytes"`
	ErofsSizeBytes      *int64 `json:"erofs_size_bytes"`
	Position            int32  `json:"position"`
}

func newImageInspectCmd() *cobra.Command {
	var format outputFormat
	cmd := &cobra.Command{
		Use:   "inspect REFERENCE",
		Short: "Show an image with its configuration and layers",
		Args:  args(cobra.ExactArgs(1)), ValidArgsFunction: completeImages,
		RunE: func(cmd *cobra.Command, argv []string) error {
			d, err := microsandbox.Image.Inspect(cmd.Context(), argv[0])
			if err != nil {
				return err
			}
			if format == formatJSON {
				return printJSON(cmd.OutOrStdout(), newImageDetail(d))
			}
			return printImage(cmd.OutOrStdout(), d)
		},
	}
	formatFlag(cmd, &format)
	return cmd
}

func newImageDetail(d *microsandbox.ImageDetail) imageDetail {
	c := d.Config
	out := imageDetail{imageRow: newImageRow(d.ImageHandle), Layers: []imageLayerRow{}, Config: imageConfigRow{
		Digest: c.Digest, Env: c.Env, Cmd: c.Cmd, Entrypoint: c.Entrypoint,
		WorkingDir: c.WorkingDir, User: c.User, Labels: c.Labels, StopSignal: c.StopSignal,
	}}
	for _, y := range d.Layers {
		out.Layers = append(out.Layers, imageLayerRow(y))
	}
	return out
}

func printImage(w io.Writer, d *microsandbox.ImageDetail) error {
	line := func(label, value string) {
		if value == "" {
			value = "-"
		}
		fmt.Fprintf(w, "%-16s%s\n", label, printable(value))
	}
	c := d.Config
	line("Reference", d.Reference())
	line("Digest", d.ManifestDigest())
	line("Platform", d.OS()+"/"+d.Architecture())
	if n := d.SizeBytes(); n != nil {
		line("Size", formatBytes(uint64(*n)))
	}
	line("Created", formatTime(d.CreatedAt()))
	line("Last used", formatTime(d.LastUsedAt()))
	line("User", c.User)
	line("Workdir", c.WorkingDir)
	line("Entrypoint", quoted(c.Entrypoint))
	line("Command", quoted(c.Cmd))
	for _, e := range c.Env {
		line("Env", e)
	}
	for _, k := range slices.Sorted(maps.Keys(c.Labels)) {
		line("Label", k+"="+c.Labels[k])
	}
	for _, y := range d.Layers {
		line(fmt.Sprintf("Layer %d", y.Position+1), fmt.Sprintf("%s %s", y.BlobDigest, formatBytes(uint64(*y.CompressedSizeBytes))))
	}
	return nil
}

// quoted shows where the words of a command begin and end.
func quoted(words []string) string {
	out := make([]string, 0, len(words))
	for _, w := range words {
		out = append(out, strconv.Quote(w))
	}
	return strings.Join(out, " ")
}
