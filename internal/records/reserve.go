package records

import (
	"database/sql"
	"strings"
)

// The reserve, in free pages. It is refilled to reserveFull below reserveLow;
// below reserveMin nothing is inserted, so that what is left serves removals.
const (
	reserveFull = 64
	reserveLow  = 32
	reserveMin  = 16
)

func (d *DB) freePages() (n int, err error) {
	rows, err := reader{d}.query("PRAGMA freelist_count")
	err = each(rows, err, func(r *sql.Rows) error { return r.Scan(&n) })
	return n, err
}

// keepReserve refills the reserve when it has fallen below low. The caller has
// the turn and is outside a transaction.
//
// Pages become free by storing and removing a row that fills them, in two
// commits: the first makes the file system allocate them. In one commit SQLite
// would leave a hole, which reserves nothing.
func (d *DB) keepReserve(low int) error {
	n, err := d.freePages()
	if err != nil || n >= low {
		return err
	}
	filler := strings.Repeat("0", reserveFull*pageSize)
	err = d.transact(func(q querier) error {
		_, err := q.exec("INSERT INTO reserve (filler) VALUES ($1)", filler)
		return err
	})
	if err != nil {
		return err
	}
	return d.transact(func(q querier) error {
		_, err := q.exec("DELETE FROM reserve")
		return err
	})
}
