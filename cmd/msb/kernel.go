package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/kernel"
	"github.com/microsandbox-go/microsandbox/internal/sandbox"
)

func newKernelCmd() *cobra.Command {
	cmd := newGroup("kernel", "Manage guest kernels", "")
	cmd.AddCommand(newKernelAddCmd(), newKernelLsCmd(), newKernelRmCmd())
	return cmd
}

func newKernelAddCmd() *cobra.Command {
	var modules string
	var quiet bool
	cmd := &cobra.Command{
		Use:   "add FILE",
		Short: "Take a guest kernel into the home",
		Long: `Take a guest kernel into the home: a Debian linux-image package (.deb, unpacked
and never installed), a vmlinux or a bzImage. A kernel with modules needs
--modules, the directory that holds them.`,
		Example: "  msb kernel add linux-image-6.1.0-cloud-amd64.deb",
		Args:    args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, files []string) error {
			h, err := home.Resolve()
			if err != nil {
				return err
			}
			if err := h.Ensure(); err != nil {
				return err
			}
			hash, err := kernel.Add(cmd.Context(), h, sandbox.Tools(h), files[0], modules)
			if err == nil && !quiet {
				fmt.Fprintln(cmd.OutOrStdout(), hash)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&modules, "modules", "", "`DIRECTORY` with the kernel's modules")
	quietFlag(cmd, &quiet, "do not print the kernel's hash")
	return cmd
}

// kernelRow is a kernel in msb kernel ls --format json.
type kernelRow struct {
	Hash    string  `json:"hash"`
	Release string  `json:"release"`
	Own     bool    `json:"own"`
	AddedAt *string `json:"added_at"`
	Source  string  `json:"source"`
}

func newKernelLsCmd() *cobra.Command {
	var format outputFormat
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"},
		Short: "List the home's guest kernels, the preferred one first",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := home.Resolve()
			if err != nil {
				return err
			}
			list, err := kernel.List(h)
			if err != nil {
				return err
			}
			rows := []kernelRow{}
			t := newTable(cmd.OutOrStdout(), "HASH", "RELEASE", "OWN", "ADDED", "SOURCE")
			for _, k := range list {
				rows = append(rows, kernelRow{k.Hash, k.Release, k.Own, jsonTime(k.AddedAt), k.Source})
				t.row(k.Hash, k.Release, fmt.Sprint(k.Own), formatTime(k.AddedAt), k.Source)
			}
			if format == formatJSON {
				return printJSON(cmd.OutOrStdout(), rows)
			}
			return t.flush()
		},
	}
	formatFlag(cmd, &format)
	return cmd
}

func newKernelRmCmd() *cobra.Command {
	return &cobra.Command{
		Use: "rm HASH...", Aliases: []string{"remove"},
		Short: "Remove guest kernels from the home",
		Args:  args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, hashes []string) error {
			h, err := home.Resolve()
			if err != nil {
				return err
			}
			for _, hash := range hashes {
				if err := kernel.Remove(h, hash); err != nil {
					return err
				}
			}
			return nil
		},
	}
}
