// Package microsandbox offers persistent named volumes for microVM sandboxes.
//
// A volume is made, filled and read from the host without any VM; mounted into
// sandboxes it is shared, limited, private and durable:
//
//	vol, err := microsandbox.CreateVolume(ctx, "pip-cache")
//	err = vol.FS().WriteString(ctx, "/note.txt", "shared cache")
//	sb, err := microsandbox.CreateSandbox(ctx, "api",
//		microsandbox.WithImage("python"),
//		microsandbox.WithMounts(map[string]microsandbox.MountConfig{
//			"/root/.cache/pip": microsandbox.Mount.Named("pip-cache", microsandbox.MountOptions{}),
//		}))
//
// # Volumes
//
// [CreateVolume], [GetVolume], [ListVolumes] and [RemoveVolume] work on the
// active [Backend]; the local one keeps everything under one directory,
// $MSB_HOME or ~/.microsandbox, and needs no daemon. A [Volume] or
// [VolumeHandle] is bound to one volume by its id: when the volume is removed
// and another is made under its name, the old handle answers ErrVolumeNotFound
// and never touches the new one.
//
// [VolumeFs] reads and writes the files of a volume directly on the host. No
// path, link or race leads out of the volume; whole-file writes and streams
// replace a file atomically.
//
// # Errors
//
// Everything that fails returns an [*Error] with a Kind to branch on, a message
// of one line, and where there is one a hint and a cause. Both
// errors.Is(err, ErrVolumeNotFound) and IsKind(err, ErrVolumeNotFound) work, and
// so do fs.ErrNotExist, fs.ErrExist and syscall.ENOSPC where that is what
// happened.
//
// Programs written for the peer's Go SDK compile after changing the import
// path; docs/reference.md lists every promise with the test that shows it.
package microsandbox
