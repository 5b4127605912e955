package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/microsandbox-go/microsandbox"
)

func newImageRemoveCmd() *cobra.Command {
	var quiet, force bool
	cmd := &cobra.Command{
		Use: "remove REFERENCE...", Aliases: []string{"rm"},
		Short: "Remove images that no sandbox uses",
		Args:  args(cobra.MinimumNArgs(1)), ValidArgsFunction: completeImages,
		RunE: func(cmd *cobra.Command, refs []string) error {
			return eachName(cmd, refs, quiet, func(ref string) error {
				ctx := cmd.Context()
				return microsandbox.Image.Remove(ctx, ref, force)
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "also the name of an image that sandboxes use; its files stay while they do")
	quietFlag(cmd, &quiet, "print nothing")
	return cmd
}

// imagePruneRow is the result of msb image prune --format json.
type imagePruneRow struct {
	ImageRefsRemoved uint32  `json:"image_refs_removed"`
	ManifestsRemoved uint32  `json:"manifests_removed"`
	LayersRemoved    uint32  `json:"layers_removed"`
	FsmetaRemoved    uint32  `json:"fsmeta_removed"`
	VMDKRemoved      uint32  `json:"vmdk_removed"`
	BytesReclaimed   *uint64 `json:"bytes_reclaimed"`
}

func newImagePruneCmd() *cobra.Command {
	var quiet, yes bool
	var format outputFormat
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Remove all images that no sandbox uses",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !yes {
				if err := confirm(cmd, "Remove all images that no sandbox uses?"); err != nil {
					return err
				}
			}
			r, err := microsandbox.Image.Prune(cmd.Context())
			if err != nil {
				return err
			}
			if format == formatJSON {
				return printJSON(cmd.OutOrStdout(), imagePruneRow(*r))
			}
			if !quiet {
				fmt.Fprintf(cmd.OutOrStdout(), "%d references removed, %s freed\n", r.ImageRefsRemoved, formatBytes(*r.BytesReclaimed))
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	formatFlag(cmd, &format)
	quietFlag(cmd, &quiet, "print nothing")
	return cmd
}

// confirm asks on a terminal; without one it demands --yes.
func confirm(cmd *cobra.Command, question string) error {
	in, ok := cmd.InOrStdin().(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return usagef("%s: --yes is required where nobody can be asked", cmd.CommandPath())
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s [y/N] ", question)
	answer, err := bufio.NewReader(in).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if a := strings.ToLower(strings.TrimSpace(answer)); a != "y" && a != "yes" {
		return errSaid
	}
	return nil
}
