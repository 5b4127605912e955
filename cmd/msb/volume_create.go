package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

type volumeCreateOptions struct {
	name        string
	kind        kindFlag
	size, quota mibFlag
	inodes      inodesFlag
	labels      labelsFlag
	quiet       bool
}

func newVolumeCreateCmd() *cobra.Command {
	var o volumeCreateOptions
	cmd := &cobra.Command{
		Use:   "create [NAME]",
		Short: "Create a volume",
		Long: `Create a volume and print its name.

A directory volume may have a quota, over all who write to it and for ever; see msb
volume set-quota. A disk volume needs a size; its image is
allocated sparsely. Sizes are 512M, 1G, 1.5G, 2T or a bare number of MiB.`,
		Example: `  msb volume create cache --quota 1G --label team=ml
  msb volume create data --kind disk --size 20G`,
		Args:              args(cobra.MaximumNArgs(1)),
		RunE:              func(cmd *cobra.Command, args []string) error { return runVolumeCreate(cmd, o, args) },
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f := cmd.Flags()
	f.StringVar(&o.name, "name", "", "name of the volume, instead of the argument")
	f.Var(&o.kind, "kind", "dir or disk (default dir)")
	f.Var(&o.size, "size", "size of a disk volume")
	f.Var(&o.quota, "quota", "limit of a directory volume (default none)")
	f.Var(&o.inodes, "inodes", "limit of files of a directory volume (default one per 4 KiB of the quota, at least 1024)")
	f.Var(&o.labels, "label", "label, may be repeated")
	quietFlag(cmd, &o.quiet, "do not print the name")
	completeKind(cmd)
	return cmd
}

func runVolumeCreate(cmd *cobra.Command, o volumeCreateOptions, args []string) error {
	name := o.name
	if len(args) == 1 {
		if name != "" && name != args[0] {
			return usagef("the volume is named twice: %q and --name %q", args[0], name)
		}
		name = args[0]
	}
	if name == "" && len(args) == 0 {
		return usagef("the volume has no name; usage: %s", cmd.UseLine())
	}
	if cmd.Flags().Changed("size") && o.size == 0 {
		return usagef("--size 0: a disk volume of no size cannot be")
	}
	if err := quotaGiven(cmd, o.quota); err != nil {
		return err
	}
	spec := microsandbox.VolumeSpec{
		Name: name, Kind: microsandbox.VolumeKind(o.kind), SizeMiB: uint32(o.size), QuotaMiB: uint32(o.quota), Labels: o.labels,
		Inodes: uint64(o.inodes),
	}
	if err := spec.Validate(); err != nil {
		return usageError{err}
	}
	v, err := microsandbox.CreateVolumeFromSpec(cmd.Context(), spec)
	if err != nil {
		return err
	}
	if !o.quiet {
		_, err = fmt.Fprintln(cmd.OutOrStdout(), v.Name())
	}
	return err
}

// quotaGiven refuses a quota of 0, which would be none.
func quotaGiven(cmd *cobra.Command, quota mibFlag) error {
	if cmd.Flags().Changed("quota") && quota == 0 {
		return usagef("--quota 0: 0 is not a quota; for no limit leave --quota out")
	}
	return nil
}

// nameGiven refuses a name that no volume can have.
func nameGiven(name string) error {
	if err := (microsandbox.VolumeSpec{Name: name}).Validate(); err != nil {
		return usageError{err}
	}
	return nil
}

// kindFlag is a volume kind; "directory" is another word for "dir".
type kindFlag microsandbox.VolumeKind

func (k *kindFlag) String() string { return string(*k) }
func (k *kindFlag) Type() string   { return "dir|disk" }

func (k *kindFlag) Set(s string) error {
	switch s {
	case "dir", "directory":
		*k = kindFlag(microsandbox.VolumeKindDir)
	case "disk":
		*k = kindFlag(microsandbox.VolumeKindDisk)
	default:
		return fmt.Errorf("unknown kind %q: dir or disk", s)
	}
	return nil
}
