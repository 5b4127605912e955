package main

import "github.com/spf13/cobra"

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

// imageShortcuts are the image commands that are also reached without "image";
// the plural and "rmi" are hidden.
var imageShortcuts = []lazyCmd{
	{"pull", newImagePullCmd},
	{"load", newImageLoadCmd},
	{"save", newImageSaveCmd},
	{"images", func() *cobra.Command {
		images := newImageListCmd()
		images.Use, images.Aliases, images.Hidden = "images", nil, true
		return images
	}},
	{"rmi", func() *cobra.Command {
		rmi := newImageRemoveCmd()
		rmi.Use, rmi.Aliases, rmi.Hidden = "rmi REFERENCE...", nil, true
		return rmi
	}},
}
