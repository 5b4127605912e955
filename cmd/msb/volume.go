package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

// volumeCommands are the commands of `msb volume`.
var volumeCommands = []lazyCmd{
	{"create", newVolumeCreateCmd},
	{"ls list", func() *cobra.Command { return newVolumeListCmd("ls", "list") }},
	{"inspect", newVolumeInspectCmd},
	{"rm remove", newVolumeRemoveCmd},
	{"rename mv", newVolumeRenameCmd},
	{"label", newVolumeLabelCmd},
	{"adopt", newVolumeAdoptCmd},
	{"prune", newVolumePruneCmd},
	{"resize", newVolumeResizeCmd},
	{"usage", newVolumeUsageCmd},
	{"set-quota", newVolumeSetQuotaCmd},
	{"repair", newVolumeRepairCmd},
	{"fs", newVolumeFsCmd},
}

// newVolumeCmd returns `msb volume` with the command that argv names, or all.
func newVolumeCmd(argv ...string) *cobra.Command {
	cmd := newGroup("volume", "Create, list, inspect, change and remove volumes, and work on their files", "", "vol")
	cmd.PersistentPreRun = func(*cobra.Command, []string) { useReaper() }
	needed := neededOf(volumeCommands, argv)
	for _, l := range volumeCommands {
		if needed == "" || needed == l.words {
			cmd.AddCommand(l.make())
		}
	}
	return cmd
}

// newVolumesCmd returns the short form of `msb volume ls`.
func newVolumesCmd() *cobra.Command {
	cmd := newVolumeListCmd("volumes", "vols")
	cmd.Hidden = true
	return cmd
}

// completeVolumes completes the first arguments with names of volumes: one of
// them, or any number when many is set.
func completeVolumes(many bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 && !many {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		handles, err := microsandbox.ListVolumes(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		var names []cobra.Completion
		for _, h := range handles {
			if strings.HasPrefix(h.Name(), prefix) && !contains(args, h.Name()) {
				names = append(names, h.Name())
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
	}
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

// labelsFlag is a repeatable --label KEY[=VALUE].
type labelsFlag map[string]string

func (l *labelsFlag) String() string { return "" }
func (l *labelsFlag) Type() string   { return "KEY[=VALUE]" }

func (l *labelsFlag) Set(s string) error {
	key, value, _ := strings.Cut(s, "=")
	if key == "" {
		return usagef("label %q has no key", s)
	}
	if *l == nil {
		*l = labelsFlag{}
	}
	(*l)[key] = value
	return nil
}

// mibFlag is a size in MiB; see parseMiB.
type mibFlag uint32

func (m *mibFlag) String() string { return "" }
func (m *mibFlag) Type() string   { return "SIZE" }

func (m *mibFlag) Set(s string) error {
	mib, err := parseMiB(s)
	*m = mibFlag(mib)
	return err
}
