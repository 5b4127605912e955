package records

import "context"

// SetVolumeQuota records another limit of a directory volume, in MiB; 0 means
// none. Errors: VolumeNotFound.
func (d *DB) SetVolumeQuota(ctx context.Context, id, name string, mib uint32) error {
	return d.changeVolume(ctx, id, name, "UPDATE volume SET quota_mib = $2 WHERE id = $1", id, int64(mib))
}
