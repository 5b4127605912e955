package records

import (
	"cmp"
	"context"
	"database/sql"
	"slices"
	"strings"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

const volumeText = "concat_ws('" + unitSep + "', " + volumeColumns + ")" // a row, see rowtext.go

const tombstoneText = "concat_ws('" + unitSep + "', id, name, dev, ino, birth_ns, removed_ns)"

const volumeColumns = "id, name, kind, quota_mib, capacity_bytes, disk_format, disk_fstype, labels, created_ns, dev, ino, birth_ns, moving_from"

// InsertVolume stores a new volume and, in the same transaction, forgets the
// tombstones named by settled. Errors: VolumeAlreadyExists when the name or id
// is taken.
func (d *DB) InsertVolume(ctx context.Context, v *Volume, settled ...string) error {
	return d.InsertVolumeWhen(ctx, Condition{}, v, settled...)
}

// InsertVolumeWhen is InsertVolume on a condition. An error of when is returned
// as it is, and then there is no record.
func (d *DB) InsertVolumeWhen(ctx context.Context, when Condition, v *Volume, settled ...string) error {
	labels, err := encodeLabels(v.Labels)
	if err != nil {
		return err
	}
	return d.insert(ctx, "record the volume "+v.Name, when, func(q querier) error {
		if err := insertRow(q, v, labels); err != nil {
			return err
		}
		return dropTombstones(q, settled)
	})
}

func insertRow(q querier, v *Volume, labels string) error {
	_, err := q.exec("INSERT INTO volume ("+volumeColumns+") VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12,$13)",
		v.ID, v.Name, v.Kind, int64(v.QuotaMiB), v.CapacityBytes, v.DiskFormat, v.DiskFstype, labels,
		v.CreatedAt.UnixNano(), int64(v.Identity.Dev), int64(v.Identity.Ino), v.Identity.BirthNS, v.MovingFrom)
	if isUnique(err) {
		return errdefs.New(errdefs.VolumeAlreadyExists, "volume %q already exists", v.Name)
	}
	return err
}

// VolumeByName returns the volume with a name. Errors: VolumeNotFound.
func (d *DB) VolumeByName(ctx context.Context, name string) (*Volume, error) {
	return d.oneVolume(ctx, "name", name)
}

// VolumeByID returns the volume with an id. Errors: VolumeNotFound.
func (d *DB) VolumeByID(ctx context.Context, id string) (*Volume, error) {
	return d.oneVolume(ctx, "id", id)
}

func (d *DB) oneVolume(ctx context.Context, column, value string) (*Volume, error) {
	found, err := d.volumes(ctx, "WHERE "+column+" = $1", value)
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, VolumeNotFound(value)
	}
	return found[0], nil
}

// VolumeNotFound is the error of every operation on a volume that is not there.
func VolumeNotFound(name string) *errdefs.Error {
	return errdefs.New(errdefs.VolumeNotFound, "volume %q not found", name)
}

// ListVolumes returns all volumes, newest first, equal times by descending id.
// With an error whose cause are DamagedRows it returns the others.
func (d *DB) ListVolumes(ctx context.Context) ([]*Volume, error) {
	all, err := d.volumes(ctx, "")
	slices.SortFunc(all, func(a, b *Volume) int {
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), strings.Compare(b.ID, a.ID))
	})
	return all, err
}

// MovingVolumes returns the volumes whose rename is not finished.
func (d *DB) MovingVolumes(ctx context.Context) ([]*Volume, error) {
	return d.volumes(ctx, "WHERE moving_from <> ''")
}

// Look is what a mutating command has to know before it begins.
type Look struct {
	Volume     *Volume     // with the name asked for; nil: none
	Tombstones []Tombstone // oldest first, nearly always few
	Moving     int         // unfinished renames, nearly always 0
}

// Look reads, at once, the volume with a name and what is unfinished.
func (d *DB) Look(ctx context.Context, name string) (Look, error) {
	const what = "look at the volumes"
	var l Look
	var row, tombs sql.NullString
	err := d.view(ctx, what, func(q querier) error {
		rows, err := q.query("SELECT (SELECT "+volumeText+" FROM volume WHERE name = $1), "+
			"(SELECT string_agg("+tombstoneText+", '"+recordSep+"') FROM tombstone), "+
			"(SELECT count(*) FROM volume WHERE moving_from <> '')", name)
		return each(rows, err, func(r *sql.Rows) error { return r.Scan(&row, &tombs, &l.Moving) })
	})
	if err == nil && row.String != "" {
		var found []*Volume
		if found, err = parseVolumes(row.String); err == nil {
			l.Volume = found[0]
		}
	}
	if err == nil && tombs.String != "" {
		l.Tombstones, err = parseTombstones(tombs.String)
		err = d.wrap(err, what)
	}
	return l, err
}

// volumes reads the rows that tail selects, as one text (see rowtext.go).
func (d *DB) volumes(ctx context.Context, tail string, args ...any) ([]*Volume, error) {
	var text sql.NullString
	err := d.view(ctx, "read the volumes", func(q querier) error {
		rows, err := q.query("SELECT string_agg("+volumeText+", '"+recordSep+"') FROM volume "+tail, args...)
		return each(rows, err, func(r *sql.Rows) error { return r.Scan(&text) })
	})
	if err != nil || text.String == "" {
		return nil, err
	}
	out, err := parseVolumes(text.String)
	return out, d.wrap(err, "read the volumes")
}

// DeleteVolume removes the record of the volume with this id, leaves a
// tombstone and forgets the settled ones. Errors: VolumeNotFound.
func (d *DB) DeleteVolume(ctx context.Context, v *Volume, settled ...string) error {
	return d.DeleteVolumeWhen(ctx, Condition{}, v, settled...)
}

// DeleteVolumeWhen is DeleteVolume on a condition. An error of when is returned
// as it is, and then the record is still there.
func (d *DB) DeleteVolumeWhen(ctx context.Context, when Condition, v *Volume, settled ...string) error {
	return d.updateWhen(ctx, "remove the record of volume "+v.Name, when, func(q querier) error {
		n, err := q.exec("DELETE FROM volume WHERE id = $1", v.ID)
		if err != nil {
			return err
		}
		if n == 0 {
			return VolumeNotFound(v.Name)
		}
		_, err = q.exec("INSERT INTO tombstone (id, name, dev, ino, birth_ns, removed_ns) VALUES ($1,$2,$3,$4,$5,$6)",
			v.ID, v.Name, int64(v.Identity.Dev), int64(v.Identity.Ino), v.Identity.BirthNS, time.Now().UnixNano())
		if err != nil {
			return err
		}
		return dropTombstones(q, settled)
	})
}

// Tombstones returns those that are not settled, oldest first.
func (d *DB) Tombstones(ctx context.Context) ([]Tombstone, error) {
	l, err := d.Look(ctx, "")
	return l.Tombstones, err
}

// DropTombstones forgets the tombstones with these ids.
func (d *DB) DropTombstones(ctx context.Context, ids ...string) error {
	if len(ids) == 0 {
		return nil
	}
	return d.update(ctx, "forget removed volumes", func(q querier) error { return dropTombstones(q, ids) })
}

func dropTombstones(q querier, ids []string) error {
	for _, id := range ids {
		if _, err := q.exec("DELETE FROM tombstone WHERE id = $1", id); err != nil {
			return err
		}
	}
	return nil
}

// RenameVolume gives a volume a new name and notes the old one until
// FinishRename. Errors: VolumeAlreadyExists, VolumeNotFound.
func (d *DB) RenameVolume(ctx context.Context, id, from, to string) error {
	return d.changeVolume(ctx, id, to, "UPDATE volume SET name = $2, moving_from = $3 WHERE id = $1", id, to, from)
}

// FinishRename forgets the old name.
func (d *DB) FinishRename(ctx context.Context, id, name string) error {
	return d.changeVolume(ctx, id, name, "UPDATE volume SET moving_from = '' WHERE id = $1", id)
}

// SetVolumeLabels replaces the labels of a volume. Errors: VolumeNotFound.
func (d *DB) SetVolumeLabels(ctx context.Context, id, name string, labels map[string]string) error {
	text, err := encodeLabels(labels)
	if err != nil {
		return err
	}
	return d.changeVolume(ctx, id, name, "UPDATE volume SET labels = $2 WHERE id = $1", id, text)
}

// SetVolumeCapacity records a grown disk, in bytes. Errors: VolumeNotFound.
func (d *DB) SetVolumeCapacity(ctx context.Context, id, name string, bytes int64) error {
	return d.changeVolume(ctx, id, name, "UPDATE volume SET capacity_bytes = $2 WHERE id = $1", id, bytes)
}

// SetVolumeIdentity records that other data is the volume's from now on (a
// restored backup that was adopted). Errors: VolumeNotFound.
func (d *DB) SetVolumeIdentity(ctx context.Context, id, name string, i Identity) error {
	return d.changeVolume(ctx, id, name, "UPDATE volume SET dev = $2, ino = $3, birth_ns = $4 WHERE id = $1",
		id, int64(i.Dev), int64(i.Ino), i.BirthNS)
}

// RestoreVolume replaces a damaged record but for its name. Errors: VolumeNotFound.
func (d *DB) RestoreVolume(ctx context.Context, v *Volume) error {
	labels, err := encodeLabels(v.Labels)
	if err != nil {
		return err
	}
	return d.changeVolume(ctx, v.ID, v.Name, "UPDATE volume SET kind = $2, quota_mib = $3, capacity_bytes = $4, disk_format = $5, "+
		"disk_fstype = $6, labels = $7, created_ns = $8, dev = $9, ino = $10, birth_ns = $11 WHERE id = $1",
		v.ID, v.Kind, int64(v.QuotaMiB), v.CapacityBytes, v.DiskFormat, v.DiskFstype, labels,
		v.CreatedAt.UnixNano(), int64(v.Identity.Dev), int64(v.Identity.Ino), v.Identity.BirthNS)
}

func (d *DB) changeVolume(ctx context.Context, id, name, query string, args ...any) error {
	return d.insert(ctx, "change the record of volume "+name, Condition{}, func(q querier) error {
		n, err := q.exec(query, args...)
		if isUnique(err) {
			return errdefs.New(errdefs.VolumeAlreadyExists, "volume %q already exists", name)
		}
		if err == nil && n == 0 {
			return VolumeNotFound(name)
		}
		return err
	})
}
