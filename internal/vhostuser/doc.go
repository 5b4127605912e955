// Package vhostuser is the device side of the vhost-user protocol.
package vhostuser
