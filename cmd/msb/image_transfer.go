package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

func newImagePullCmd() *cobra.Command {
	var quiet, force, insecure bool
	var caCerts string
	cmd := &cobra.Command{
		Use:   "pull REFERENCE",
		Short: "Fetch an image from its registry",
		Long: `Fetch an image for this machine's architecture and make its root file system. What is
here already is not fetched again; a download that broke off is continued.

Registries on the loopback interface and on private networks may speak plain http.
Credentials are those of docker (~/.docker/config.json).`,
		Example: "  msb pull debian:bookworm\n  msb pull localhost:5000/team/app@sha256:...",
		Args:    args(cobra.ExactArgs(1)), ValidArgsFunction: completeImages,
		RunE: func(cmd *cobra.Command, argv []string) error {
			o := microsandbox.ImagePullOptions{Insecure: insecure, Force: force}
			if caCerts != "" {
				pem, err := os.ReadFile(caCerts)
				if err != nil {
					return usagef("--ca-certs: %w", err)
				}
				o.CACerts = pem
			}
			p := newImageProgress(cmd.ErrOrStderr(), argv[0], quiet)
			o.Progress = p.report
			img, err := microsandbox.Image.Pull(cmd.Context(), argv[0], o)
			p.finish()
			if err != nil {
				return err
			}
			printReferences(cmd, quiet, img)
			return nil
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "check all files that are here again")
	cmd.Flags().BoolVar(&insecure, "insecure", false, "allow plain http and unverified certificates")
	cmd.Flags().StringVar(&caCerts, "ca-certs", "", "`FILE` with PEM certificates to trust besides the system's")
	quietFlag(cmd, &quiet, "print nothing")
	return cmd
}

func newImageLoadCmd() *cobra.Command {
	var quiet bool
	var input string
	var tags []string
	cmd := &cobra.Command{
		Use:   "load [PATH]",
		Short: "Read images from an OCI layout or a docker archive",
		Long: `Read images from an OCI layout (a directory or a tar archive) or from what docker save
writes; archives may be compressed with gzip or zstd. PATH and --input mean the same.
The names are those in the archive; --tag gives others to the one image in it.`,
		Example: "  docker save app:v1 | zstd >app.tar.zst; msb load app.tar.zst\n  msb load -i build/demo-image",
		Args:    args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, argv []string) error {
			switch {
			case len(argv) == 1 && input == "":
				input = argv[0]
			case len(argv) == 1 && argv[0] != input:
				return usagef("load: two paths, %q and %q", argv[0], input)
			case input == "":
				return usagef("load: which archive? give PATH or --input PATH")
			}
			p := newImageProgress(cmd.ErrOrStderr(), input, quiet)
			imgs, err := microsandbox.Image.LoadWith(cmd.Context(), input, microsandbox.ImageLoadOptions{Tags: tags, Progress: p.report})
			p.finish()
			printReferences(cmd, quiet, imgs...)
			return err
		},
	}
	cmd.Flags().StringVarP(&input, "input", "i", "", "directory or archive to read, a `PATH`")
	cmd.Flags().StringArrayVarP(&tags, "tag", "t", nil, "`NAME` of the image (repeatable)")
	_ = cmd.RegisterFlagCompletionFunc("tag", cobra.NoFileCompletions)
	quietFlag(cmd, &quiet, "print nothing")
	return cmd
}

func newImageSaveCmd() *cobra.Command {
	var quiet bool
	var output string
	var format string
	cmd := &cobra.Command{
		Use:     "save REFERENCE... --output PATH",
		Short:   "Write images into an archive",
		Example: "  msb image save demo --output demo.tar",
		Args:    args(cobra.MinimumNArgs(1)), ValidArgsFunction: completeImages,
		RunE: func(cmd *cobra.Command, refs []string) error {
			if output == "" {
				return usagef("save: --output PATH is required")
			}
			if output == "-" {
				output, quiet = "/dev/stdout", true
			}
			if err := microsandbox.Image.Save(cmd.Context(), refs, output, microsandbox.ImageArchiveFormat(format)); err != nil {
				return err
			}
			if !quiet {
				fmt.Fprintln(cmd.OutOrStdout(), output)
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "archive to write, a `PATH`, - for standard output")
	cmd.Flags().StringVar(&format, "format", string(microsandbox.ImageArchiveOCI), "`FORMAT`: oci; docker is not written yet")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"oci", "docker"}, cobra.ShellCompDirectiveNoFileComp))
	quietFlag(cmd, &quiet, "print nothing")
	return cmd
}

func printReferences(cmd *cobra.Command, quiet bool, imgs ...*microsandbox.ImageHandle) {
	if quiet {
		return
	}
	for _, i := range imgs {
		fmt.Fprintln(cmd.OutOrStdout(), printable(i.Reference()))
	}
}
