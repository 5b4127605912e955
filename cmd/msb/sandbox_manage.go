package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

func newStartCmd() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:   "start NAME...",
		Short: "Boot stopped sandboxes again, in the background",
		Args:  args(cobra.MinimumNArgs(1)), ValidArgsFunction: completeSandboxes(true),
		RunE: func(cmd *cobra.Command, names []string) error {
			return eachName(cmd, names, quiet, func(name string) error {
				ctx := cmd.Context()
				sb, err := microsandbox.StartSandboxDetached(ctx, name)
				if err != nil {
					return err
				}
				return sb.Close()
			})
		},
	}
	quietFlag(cmd, &quiet, "print nothing")
	return cmd
}

func newStopCmd() *cobra.Command {
	var quiet, force bool
	var timeout uint
	cmd := &cobra.Command{
		Use:   "stop NAME...",
		Short: "Stop sandboxes cleanly",
		Long: `Stop sandboxes cleanly: programs are ended, file systems synced and unmounted, the
guest powers off. A guest that does not within the timeout is killed.`,
		Args: args(cobra.MinimumNArgs(1)), ValidArgsFunction: completeSandboxes(true),
		RunE: func(cmd *cobra.Command, names []string) error {
			return eachName(cmd, names, quiet, func(name string) error {
				ctx := cmd.Context()
				h, err := microsandbox.GetSandbox(ctx, name)
				if err != nil {
					return err
				}
				if force {
					return h.Kill(ctx)
				}
				return h.Stop(ctx, microsandbox.WithStopTimeout(time.Duration(timeout)*time.Second))
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "kill at once, as msb kill does")
	cmd.Flags().UintVarP(&timeout, "timeout", "t", 10, "`SECONDS` the guest may take")
	quietFlag(cmd, &quiet, "print nothing")
	return cmd
}

func newKillCmd() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:   "kill NAME...",
		Short: "End sandboxes at once, as a power cut would",
		Args:  args(cobra.MinimumNArgs(1)), ValidArgsFunction: completeSandboxes(true),
		RunE: func(cmd *cobra.Command, names []string) error {
			return eachName(cmd, names, quiet, func(name string) error { return killByName(cmd.Context(), name) })
		},
	}
	quietFlag(cmd, &quiet, "print nothing")
	return cmd
}

func killByName(ctx context.Context, name string) error {
	h, err := microsandbox.GetSandbox(ctx, name)
	if err != nil {
		return err
	}
	return h.Kill(ctx)
}

func newRmCmd() *cobra.Command {
	var quiet, force bool
	cmd := &cobra.Command{
		Use: "rm NAME...", Aliases: []string{"remove"},
		Short: "Remove sandboxes; volumes stay",
		Args:  args(cobra.MinimumNArgs(1)), ValidArgsFunction: completeSandboxes(true),
		RunE: func(cmd *cobra.Command, names []string) error {
			return eachName(cmd, names, quiet, func(name string) error {
				ctx := cmd.Context()
				if force {
					if err := killByName(ctx, name); err != nil && !microsandbox.IsKind(err, microsandbox.ErrSandboxNotRunning) {
						return err
					}
				}
				err := microsandbox.RemoveSandbox(ctx, name)
				if force && microsandbox.IsKind(err, microsandbox.ErrSandboxNotFound) {
					return nil // an ephemeral one goes with its kill
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "kill running ones first")
	quietFlag(cmd, &quiet, "print nothing")
	return cmd
}

// sandboxRow is a sandbox in msb ls --format json.
type sandboxRow struct {
	Name      string  `json:"name"`
	Status    string  `json:"status"`
	Cause     string  `json:"cause,omitempty"`
	CreatedAt *string `json:"created_at"`
	Image     string  `json:"image"`
}

func newLsCmd() *cobra.Command {
	var format outputFormat
	var quiet, running, stopped bool
	var labels labelFilter
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list", "ps"},
		Short: "List sandboxes, newest first",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			page, err := microsandbox.ListSandboxesWith(cmd.Context(), microsandbox.WithListLabels(labels.labels))
			if err != nil {
				return err
			}
			rows := []sandboxRow{}
			for _, h := range page.Sandboxes {
				alive := h.Status() == microsandbox.SandboxStatusRunning
				if running && !alive || stopped && alive || !hasKeys(h.Labels(), labels.keys) {
					continue
				}
				rows = append(rows, sandboxRow{h.Name(), string(h.Status()), h.Cause(), jsonTime(h.CreatedAt()), h.Image()})
			}
			return printSandboxes(cmd, rows, page, format, quiet)
		},
	}
	cmd.Flags().BoolVar(&running, "running", false, "only running ones")
	cmd.Flags().BoolVar(&stopped, "stopped", false, "only those that do not run")
	cmd.Flags().Var(&labels, "label", "only those with label `KEY[=VALUE]`, without =VALUE with any value of it; repeated, with all of them")
	quietFlag(cmd, &quiet, "print names only")
	formatFlag(cmd, &format)
	return cmd
}

func hasKeys(labels map[string]string, keys []string) bool {
	return !slices.ContainsFunc(keys, func(key string) bool {
		_, ok := labels[key]
		return !ok
	})
}

func printSandboxes(cmd *cobra.Command, rows []sandboxRow, page *microsandbox.SandboxPage, format outputFormat, quiet bool) error {
	out := cmd.OutOrStdout()
	if quiet {
		for _, r := range rows {
			fmt.Fprintln(out, r.Name)
		}
		return nil
	}
	if format == formatJSON {
		return printJSON(out, rows)
	}
	if len(rows) == 0 {
		fmt.Fprintln(cmd.ErrOrStderr(), "No sandboxes found.")
		return nil
	}
	created := map[string]time.Time{}
	for _, h := range page.Sandboxes {
		created[h.Name()] = h.CreatedAt()
	}
	t := newTable(out, "NAME", "STATUS", "IMAGE", "CREATED")
	for _, r := range rows {
		status := r.Status
		if r.Cause != "" {
			status += " (" + r.Cause + ")"
		}
		t.row(r.Name, status, r.Image, formatTime(created[r.Name]))
	}
	return t.flush()
}
