package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox"
)

// newVolumeFsCmd returns `msb volume fs`: the operations of VolumeFs.
func newVolumeFsCmd() *cobra.Command {
	cmd := newGroup("fs", "Work on the files of a volume, without a sandbox", `Work on the files of a directory volume, without a sandbox.

Paths are relative to the volume's root; a leading slash does not matter. No path
and no link leads out of the volume.`)
	cmd.AddCommand(
		newFsReadCmd(),
		newFsWriteCmd(),
		newFsListCmd(),
		newFsStatCmd(),
		newFsExistsCmd(),
		newFsPathsCmd("mkdir", "Make directories and their parents", (*microsandbox.VolumeFs).Mkdir),
		newFsPathsCmd("rm", "Remove files", (*microsandbox.VolumeFs).Remove),
		newFsPathsCmd("rmdir", "Remove directories with everything in them", (*microsandbox.VolumeFs).RemoveDir),
		newFsPairCmd("cp", "Copy a file within the volume", (*microsandbox.VolumeFs).Copy),
		newFsPairCmd("mv", "Rename or move a file or directory", (*microsandbox.VolumeFs).Rename),
	)
	return cmd
}

// fsCommand is a command whose first argument is a volume.
func fsCommand(use, short string, check cobra.PositionalArgs, run func(cmd *cobra.Command, fs *microsandbox.VolumeFs, paths []string) error) *cobra.Command {
	return &cobra.Command{
		Use:               use,
		Short:             short,
		Args:              args(check),
		ValidArgsFunction: completeVolumes(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := microsandbox.GetVolume(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return run(cmd, h.FS(), args[1:])
		},
	}
}

func newFsPathsCmd(verb, short string, do func(*microsandbox.VolumeFs, context.Context, string) error) *cobra.Command {
	return fsCommand(verb+" NAME PATH...", short, cobra.MinimumNArgs(2),
		func(cmd *cobra.Command, fs *microsandbox.VolumeFs, paths []string) error {
			return eachName(cmd, paths, true, func(path string) error { return do(fs, cmd.Context(), path) })
		})
}

func newFsPairCmd(verb, short string, do func(fs *microsandbox.VolumeFs, ctx context.Context, from, to string) error) *cobra.Command {
	return fsCommand(verb+" NAME FROM TO", short, cobra.ExactArgs(3),
		func(cmd *cobra.Command, fs *microsandbox.VolumeFs, paths []string) error {
			return do(fs, cmd.Context(), paths[0], paths[1])
		})
}

func newFsReadCmd() *cobra.Command {
	return fsCommand("read NAME PATH", "Write a file to standard output", cobra.ExactArgs(2),
		func(cmd *cobra.Command, fs *microsandbox.VolumeFs, paths []string) error {
			r, err := fs.ReadStream(cmd.Context(), paths[0])
			if err != nil {
				return err
			}
			if err := drain(cmd.Context(), r, cmd.OutOrStdout()); err != nil {
				return err
			}
			return r.Close()
		})
}

// drain copies r to w. Who reads w may have stopped reading, which cannot be
// interrupted either: when ctx ends first the copying goroutine is left behind.
func drain(ctx context.Context, r io.WriterTo, w io.Writer) error {
	done := make(chan error, 1)
	go func() {
		_, err := r.WriteTo(w)
		done <- err
	}()
	select {
	case <-ctx.Done():
		return fmt.Errorf("interrupted: %w", ctx.Err())
	case err := <-done:
		return err
	}
}

func newFsWriteCmd() *cobra.Command {
	var durable bool
	cmd := fsCommand("write NAME PATH", "Replace a file by standard input", cobra.ExactArgs(2),
		func(cmd *cobra.Command, fs *microsandbox.VolumeFs, paths []string) error {
			if isClosed(cmd.InOrStdin()) {
				return hinted{errors.New("standard input is closed: there is nothing to write"), "an empty file: " + cmd.UseLine() + " </dev/null"}
			}
			if durable {
				fs = fs.Durable()
			}
			w, err := fs.WriteStream(cmd.Context(), paths[0])
			if err != nil {
				return err
			}
			defer w.Abort()
			if err := pump(cmd.Context(), w, cmd.InOrStdin()); err != nil {
				return err
			}
			return w.Close()
		})
	cmd.Long = `Replace a file by standard input, or make it and its missing parents.

The file changes in one step when the input ends. If the command fails or is
interrupted the old file stays.`
	cmd.Flags().BoolVar(&durable, "durable", false, "return when the file would survive a power cut")
	return cmd
}

// isClosed reports whether standard input was closed when the program began. Go
// has then opened /dev/null there, for reading and writing, which a shell's
// "</dev/null" is not. A file must not become empty because nobody passed one on.
func isClosed(r io.Reader) bool {
	if r != os.Stdin {
		return false
	}
	const stdin = 0
	var is, null unix.Stat_t
	flags, err := unix.FcntlInt(stdin, unix.F_GETFL, 0)
	return err == nil && flags&unix.O_ACCMODE == unix.O_RDWR && unix.Fstat(stdin, &is) == nil &&
		unix.Stat(os.DevNull, &null) == nil && is.Rdev == null.Rdev && is.Mode&unix.S_IFMT == unix.S_IFCHR
}

// pump copies r to w until r ends or ctx does. Reading standard input cannot be
// interrupted, so it has a goroutine of its own, which is left behind when ctx
// ends first; what it reads then goes nowhere.
func pump(ctx context.Context, w io.Writer, r io.Reader) error {
	type piece struct {
		b   []byte
		err error
	}
	full, free := make(chan piece), make(chan []byte, 2)
	for range cap(free) {
		free <- make([]byte, 256<<10)
	}
	go func() {
		for b := range free {
			n, err := r.Read(b)
			full <- piece{b[:n], err}
			if err != nil {
				return
			}
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("interrupted: %w", ctx.Err())
		case p := <-full:
			if _, err := w.Write(p.b); err != nil {
				return err
			}
			if p.err == io.EOF {
				return nil
			}
			if p.err != nil {
				return fmt.Errorf("standard input: %w", p.err)
			}
			free <- p.b[:cap(p.b)]
		}
	}
}

// entryJSON is a file in `msb volume fs ls --format json`.
type entryJSON struct {
	Path       string  `json:"path"`
	Kind       string  `json:"kind"`
	Size       int64   `json:"size"`
	Mode       uint32  `json:"mode"`
	UID        uint32  `json:"uid"`
	GID        uint32  `json:"gid"`
	AccessedAt *string `json:"accessed_at"`
	ModifiedAt *string `json:"modified_at"`
}

// statJSON is a file in `msb volume fs stat --format json`.
type statJSON struct {
	entryJSON
	CreatedAt *string `json:"created_at"`
	Readonly  bool    `json:"readonly"`
}

func newFsListCmd() *cobra.Command {
	var format outputFormat
	var quiet bool
	cmd := fsCommand("ls NAME [PATH]", "List a directory", cobra.RangeArgs(1, 2),
		func(cmd *cobra.Command, fs *microsandbox.VolumeFs, paths []string) error {
			entries, err := fs.List(cmd.Context(), append(paths, "/")[0])
			if err != nil {
				return err
			}
			return printEntries(cmd.OutOrStdout(), entries, format, quiet)
		})
	formatFlag(cmd, &format)
	quietFlag(cmd, &quiet, "print paths only")
	return cmd
}

func printEntries(w io.Writer, entries []microsandbox.FsEntry, format outputFormat, quiet bool) error {
	switch {
	case format == formatJSON:
		list := make([]entryJSON, len(entries))
		for i, e := range entries {
			list[i] = entryJSON{e.Path, string(e.Kind), e.Size, e.Mode, e.UID, e.GID, jsonTime(e.AccessTime), jsonTime(e.ModTime)}
		}
		return printJSON(w, list)
	case quiet:
		for _, e := range entries {
			if _, err := fmt.Fprintln(w, printable(e.Path)); err != nil {
				return err
			}
		}
		return nil
	}
	t := newTable(w, "MODE", "UID", "GID", "SIZE", "MODIFIED", "PATH")
	for _, e := range entries {
		t.row(modeText(e.Kind, e.Mode), fmt.Sprint(e.UID), fmt.Sprint(e.GID), fmt.Sprint(e.Size), formatTime(e.ModTime), e.Path)
	}
	return t.flush()
}

// modeText is a mode as ls shows it: type letter and permission bits.
func modeText(kind microsandbox.FsEntryKind, mode uint32) string {
	m := os.FileMode(mode & 0o777)
	for bit, flag := range map[uint32]os.FileMode{0o4000: os.ModeSetuid, 0o2000: os.ModeSetgid, 0o1000: os.ModeSticky} {
		if mode&bit != 0 {
			m |= flag
		}
	}
	switch kind {
	case microsandbox.FsEntryKindDirectory:
		m |= os.ModeDir
	case microsandbox.FsEntryKindSymlink:
		m |= os.ModeSymlink
	case microsandbox.FsEntryKindOther:
		m |= os.ModeIrregular
	}
	return m.String()
}

func newFsStatCmd() *cobra.Command {
	var format outputFormat
	cmd := fsCommand("stat NAME PATH", "Show what a path leads to", cobra.ExactArgs(2),
		func(cmd *cobra.Command, fs *microsandbox.VolumeFs, paths []string) error {
			s, err := fs.Stat(cmd.Context(), paths[0])
			if err != nil {
				return err
			}
			if format == formatJSON {
				return printJSON(cmd.OutOrStdout(), statJSON{
					entryJSON{s.Path, string(s.Kind), s.Size, s.Mode, s.UID, s.GID, jsonTime(s.AccessTime), jsonTime(s.ModTime)},
					jsonTime(s.CreateTime), s.Readonly,
				})
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%-16s%s\n%-16s%s\n%-16s%d\n%-16s%s (%04o)\n%-16s%d:%d\n%-16s%s\n%-16s%s\n",
				"Path", printable(s.Path), "Kind", s.Kind, "Size", s.Size, "Mode", modeText(s.Kind, s.Mode), s.Mode,
				"Owner", s.UID, s.GID, "Modified", formatTime(s.ModTime), "Created", formatTime(s.CreateTime))
			return err
		})
	formatFlag(cmd, &format)
	return cmd
}

func newFsExistsCmd() *cobra.Command {
	var quiet bool
	cmd := fsCommand("exists NAME PATH", "Say whether a path leads to anything", cobra.ExactArgs(2),
		func(cmd *cobra.Command, fs *microsandbox.VolumeFs, paths []string) error {
			ok, err := fs.Exists(cmd.Context(), paths[0])
			if err != nil {
				return err
			}
			if !quiet {
				fmt.Fprintln(cmd.OutOrStdout(), ok)
			}
			if !ok {
				return exitError{exitFailure}
			}
			return nil
		})
	cmd.Long = `Print true or false, and exit with 0 or 1. Where it cannot be told, because the volume
does not exist for instance, an error is printed, nothing else, and the code is 1, too.`
	quietFlag(cmd, &quiet, "print nothing")
	return cmd
}
