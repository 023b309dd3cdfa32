package node

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/internal/daemon"
)

// raftRoom is what the replicated log keeps for itself where the audit log is on its file
// system: so much, or this part of a small one.
const (
	raftRoom     = 1 << 30
	raftRoomPart = 20
)

// openAudit opens the audit log.
func (n *Node) openAudit() error {
	cfg := n.cfg.Audit
	switch cfg.File {
	case "off":
		return nil
	case "stderr":
		n.audit = server.NewAudit(os.Stderr, n.cfg.Name, cfg.Required, n.log, n.registry)
		return nil
	}
	bound := daemon.LogBound{Bytes: cfg.MaxSize.Bytes}
	// The file may be a link to another file system, and is not there yet at first.
	at := cfg.File
	if _, err := os.Stat(at); err != nil {
		at = filepath.Dir(cfg.File)
	}
	n.auditShares = daemon.SameDisk(at, n.cfg.DataDir)
	if n.auditShares {
		bound.Free = func() (free, others uint64) {
			free, size, err := daemon.DiskSpace(n.cfg.DataDir)
			if err != nil {
				return 1 << 62, 0 // not known: the bound alone counts
			}
			return free, min(raftRoom, size/raftRoomPart)
		}
	}
	file, err := daemon.OpenLogFile(cfg.File, 0o600, bound)
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	if n.auditShares && !n.cfg.Keys.InsecureDev {
		n.log.Warn("the audit log is on the file system of the replicated log: put it on another one (audit.file), so that neither takes the other's room", "file", cfg.File)
	}
	n.auditLog = file
	n.audit = server.NewAudit(file, n.cfg.Name, cfg.Required, n.log, n.registry)
	gauge := func(name, help string, value func() float64) {
		n.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
	}
	gauge("entente_ca_audit_file_bytes", "Size of the audit log with its rotated files.", func() float64 { return float64(file.Size()) })
	gauge("entente_ca_audit_file_limit_bytes", "Bound of that size (audit.maxSize).", func() float64 { return float64(cfg.MaxSize.Bytes) })
	gauge("entente_ca_audit_shares_raft_disk", "1 if the audit log is on the file system of the replicated log.", func() float64 {
		if n.auditShares {
			return 1
		}
		return 0
	})
	gauge("entente_ca_audit_degraded", "1 if SVIDs are counted in the audit log instead of recorded one by one, or acts are missing.", func() float64 {
		if n.audit.Problem() != nil {
			return 1
		}
		return 0
	})
	return nil
}

func (n *Node) auditStatus() server.AuditLog {
	status := server.AuditLog{File: n.cfg.Audit.File, SharesRaft: n.auditShares}
	if n.auditLog != nil {
		status.Bytes, status.Bound = n.auditLog.Size(), n.cfg.Audit.MaxSize.Bytes
	}
	if err := n.audit.Problem(); err != nil {
		status.Problem = err.Error()
	}
	return status
}
