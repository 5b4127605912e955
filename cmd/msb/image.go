package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

// newImageCmd returns "msb image" with its subcommands.
func newImageCmd() *cobra.Command {
	cmd := newGroup("image", "Pull, load and remove the images of sandboxes", `Images are what sandboxes boot from. They are pulled from a registry, or loaded from
an OCI layout or a docker archive. Each one becomes a read-only root file system,
made once and shared by all its sandboxes.`)
	cmd.AddCommand(
		newImagePullCmd(), newImageLoadCmd(), newImageSaveCmd(), newImageListCmd(),
		newImageInspectCmd(), newImageRemoveCmd(), newImagePruneCmd(),
	)
	return cmd
}

// newImageShortcuts returns the image commands that are also reached without
// "image"; the plural and "rmi" are hidden.
func newImageShortcuts() []*cobra.Command {
	images, rmi := newImageListCmd(), newImageRemoveCmd()
	images.Use, images.Aliases, images.Hidden = "images", nil, true
	rmi.Use, rmi.Aliases, rmi.Hidden = "rmi REFERENCE...", nil, true
	return []*cobra.Command{newImagePullCmd(), newImageLoadCmd(), newImageSaveCmd(), images, rmi}
}

// completeImages offers the references of this machine.
func completeImages(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	imgs, err := microsandbox.Image.List(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names := make([]string, 0, len(imgs))
	for _, i := range imgs {
		names = append(names, i.Reference())
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
