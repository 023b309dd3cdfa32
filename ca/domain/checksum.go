package domain

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/bits"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// ChecksumFormat names the encodings below. It changes with any of them; replicas
// of different formats do not compare.
const ChecksumFormat = 3

// setHash is a hash over a set of records that can be kept up to date: the sum, mod
// 2^256, of the SHA-256 of each record's encoding. Order does not matter, and a
// record that stands there twice does not vanish as it would with XOR. It finds
// replicas that differ by a fault; it is no commitment against somebody who chooses
// the records, and need not be: each replica computes its own.
type setHash [4]uint64

func (h *setHash) add(record [4]uint64) {
	var carry uint64
	for i := range h {
		h[i], carry = bits.Add64(h[i], record[i], carry)
	}
}

func (h *setHash) remove(record [4]uint64) {
	var borrow uint64
	for i := range h {
		h[i], borrow = bits.Sub64(h[i], record[i], borrow)
	}
}

// Checksum is the hash of the whole state: of its records and its numbers.
func (s *State) Checksum() []byte {
	sum := s.checksum()
	return sum[:]
}

// ChecksumAt is the hash that the state had at an index of the last thousand, as far as
// this replica was there.
func (s *State) ChecksumAt(index uint64) (sum []byte, ok bool) {
	if index == s.applied {
		return s.Checksum(), true
	}
	at, ok := s.history.at(index)
	return at[:], ok
}

func (s *State) checksum() [sha256.Size]byte {
	b := make([]byte, 0, 128)
	b = append(b, ChecksumFormat, 'S')
	for _, limb := range s.sum {
		b = binary.LittleEndian.AppendUint64(b, limb)
	}
	for _, n := range []uint64{s.applied, s.revision, s.bundle, s.catalogue, uint64(s.now)} {
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	return sha256.Sum256(b)
}

// hashRecord hashes one record for the set.
func hashRecord(record any) [4]uint64 {
	e := encoder{b: make([]byte, 0, 512)}
	e.b = append(e.b, ChecksumFormat)
	e.record(record)
	return hashEncoding(e.b)
}

// hashEncoding hashes a record's encoding, which the format stands in front of.
func hashEncoding(b []byte) [4]uint64 {
	sum := sha256.Sum256(b)
	var limbs [4]uint64
	for i := range limbs {
		limbs[i] = binary.LittleEndian.Uint64(sum[8*i:])
	}
	return limbs
}

// encoder writes records in a form of our own: a letter for the kind, then every
// field in the order of its number, numbers as varints, everything else with its
// length. It does not depend on how a protobuf library orders what it writes.
type encoder struct{ b []byte }

func (e *encoder) kind(letter byte)    { e.b = append(e.b, letter) }
func (e *encoder) number(n uint64)     { e.b = binary.AppendUvarint(e.b, n) }
func (e *encoder) time(seconds int64)  { e.b = binary.AppendVarint(e.b, seconds) }
func (e *encoder) text(s string)       { e.number(uint64(len(s))); e.b = append(e.b, s...) }
func (e *encoder) bytes(b []byte)      { e.number(uint64(len(b))); e.b = append(e.b, b...) }
func (e *encoder) texts(list []string) { encodeList(e, list, (*encoder).text) }
func (e *encoder) yes(b bool) {
	if b {
		e.number(1)
	} else {
		e.number(0)
	}
}

// level stands at the end of a record; one that has none is encoded as before there were
// levels. What else came later and is rarely set is written in the same way.
func (e *encoder) level(n uint32) {
	if n != 0 {
		e.kind('L')
		e.number(uint64(n))
	}
}

func encodeList[T any](e *encoder, list []T, one func(*encoder, T)) {
	e.number(uint64(len(list)))
	for _, item := range list {
		one(e, item)
	}
}

func (e *encoder) cluster(r *statev1.Cluster) {
	e.kind('C')
	e.text(r.GetTrustDomain())
	e.bytes(r.GetId())
	e.number(uint64(r.GetEpoch()))
	e.yes(r.GetDev())
	l := r.GetLifetimes()
	e.number(uint64(l.GetX509SvidSeconds()))
	e.number(uint64(l.GetPhaseSeconds()))
	e.number(uint64(l.GetAgentSvidSeconds()))
	e.number(uint64(l.GetBundleRefreshHintSeconds()))
	e.number(uint64(l.GetJwtSvidSeconds()))
	e.number(uint64(l.GetWitSvidSeconds()))
	for _, replaced := range r.GetReplaced() {
		e.kind('R')
		e.bytes(replaced.GetFormer())
		e.bytes(replaced.GetNext())
		e.bytes(replaced.GetSignature())
	}
	// A record that does not use these is encoded as it was before they existed.
	if len(r.GetRecoveryKey()) == 0 && r.GetMinVoters() == 0 && r.GetRecovery() == nil && r.GetFeatureLevel() == 0 && r.GetHardenedAt() == 0 {
		return
	}
	e.bytes(r.GetRecoveryKey())
	e.number(uint64(r.GetMinVoters()))
	e.yes(r.GetRecovery() != nil)
	if recovery := r.GetRecovery(); recovery != nil {
		e.bytes(recovery.GetStatement())
		e.bytes(recovery.GetSignature())
		encodeList(e, recovery.GetAbsent(), func(e *encoder, m *statev1.Member) { e.record(m) })
		e.time(recovery.GetRevokeAt())
	}
	e.level(r.GetFeatureLevel())
	if r.GetHardenedAt() != 0 {
		e.number(r.GetHardenedAt())
	}
}

func (e *encoder) record(record any) {
	switch r := record.(type) {
	case *statev1.Cluster:
		e.cluster(r)
	case *statev1.Member:
		e.kind('M')
		e.text(r.GetId())
		e.text(r.GetName())
		e.text(r.GetDatacenter())
		e.text(r.GetRaftAddress())
		e.text(r.GetApiAddress())
		e.yes(r.GetVoter())
		e.yes(r.GetSigning())
		e.level(r.GetFeatureLevel())
	case *statev1.Authority:
		e.kind('A')
		e.text(r.GetId())
		e.text(r.GetMemberId())
		e.number(uint64(r.GetUse()))
		e.bytes(r.GetPublicKey())
		e.bytes(r.GetCertificate())
		e.time(r.GetNotBefore())
		e.time(r.GetNotAfter())
		e.number(uint64(r.GetPhase()))
		e.yes(r.GetReady())
		e.number(r.GetRevision())
		e.number(r.GetPreparedRevision())
		e.texts(r.GetAssumed())
		e.yes(r.GetDrained())
		e.texts(r.GetAssumedDrained())
		e.time(r.GetSince())
		if len(r.GetUpstream()) > 0 || r.GetUpstreamNotAfter() != 0 {
			e.bytes(r.GetUpstream())
			e.time(r.GetUpstreamNotAfter())
		}
		if len(r.GetProof()) > 0 {
			e.kind('p')
			e.bytes(r.GetProof())
		}
	case *statev1.Token:
		e.kind('T')
		e.text(r.GetId())
		e.bytes(r.GetPublicKey())
		e.time(r.GetNotAfter())
		switch grant := r.GetGrant().(type) {
		case *statev1.Token_Node:
			e.kind('n')
			e.text(grant.Node.GetName())
			e.text(grant.Node.GetDatacenter())
			e.yes(grant.Node.GetVoter())
			e.yes(grant.Node.GetSigning())
		case *statev1.Token_Agent:
			e.kind('a')
			e.text(grant.Agent.GetName())
			e.text(grant.Agent.GetDatacenter())
			e.texts(grant.Agent.GetAddresses())
			// A record that does not use these is encoded as it was before they existed.
			if len(grant.Agent.GetSelectors())+len(grant.Agent.GetPathPrefixes()) > 0 {
				e.kind('s')
				e.texts(grant.Agent.GetSelectors())
				e.texts(grant.Agent.GetPathPrefixes())
			}
		default:
			e.kind('-')
		}
		e.text(r.GetUsedBy())
	case *statev1.Agent:
		e.kind('H')
		e.text(r.GetName())
		e.text(r.GetKeyId())
		e.text(r.GetDatacenter())
		e.texts(r.GetAddresses())
		e.number(r.GetGeneration())
		e.yes(r.GetBanned())
		if len(r.GetSelectors())+len(r.GetPathPrefixes())+len(r.GetCertificate()) > 0 {
			e.texts(r.GetSelectors())
			e.texts(r.GetPathPrefixes())
			e.text(r.GetCertificate())
		}
	case *statev1.Entry: // decodeEntry and viewEntry read it
		e.kind('E')
		e.text(r.GetId())
		e.text(r.GetPath())
		e.texts(r.GetHosts())
		e.texts(r.GetSelectors())
		e.number(uint64(r.GetX509SvidSeconds()))
		e.texts(r.GetDnsNames())
		e.texts(r.GetFederatesWith())
		e.number(uint64(r.GetRole()))
		e.number(r.GetRevision())
		e.text(r.GetHint())
		e.number(uint64(r.GetJwtSvidSeconds()))
		e.number(uint64(r.GetWitSvidSeconds()))
		if len(r.GetNodeSelectors()) > 0 {
			e.texts(r.GetNodeSelectors())
		}
	case *statev1.Distrust:
		e.kind('D')
		e.text(r.GetId())
		e.text(r.GetAuthority())
		e.text(r.GetAgent())
		e.number(r.GetAgentGeneration())
		e.text(r.GetEntry())
		e.number(r.GetEntryGeneration())
		e.time(r.GetNotAfter())
		e.number(r.GetRevision())
		if r.GetPath() != "" {
			e.kind('p')
			e.text(r.GetPath())
		}
		e.level(r.GetGraceMs())
	case *statev1.Object:
		e.kind('O')
		e.object(r)
		e.text(r.GetOwner())
		e.number(r.GetRevision())
		e.text(r.GetSource())
		e.level(uint32(r.GetService().GetProtocol()))
		if r.GetService().GetEdge() {
			e.kind('E')
		}
		if h := r.GetService().GetHttp(); h != nil {
			e.kind('H')
			e.yes(h.GetAnyContent())
			e.yes(h.GetReadsBodies())
		}
		if i := r.GetImport(); i.GetPort() != 0 || i.GetProtocol() != 0 {
			e.number(uint64(i.GetPort()))
			e.number(uint64(i.GetProtocol()))
		}
	case *statev1.Staged:
		e.kind('P')
		e.bytes(r.GetId())
		e.number(uint64(r.GetPart()))
		encodeList(e, r.GetObjects().GetUpserts(), func(e *encoder, o *statev1.Object) { e.record(o) })
		encodeList(e, r.GetObjects().GetDeletes(), func(e *encoder, k *statev1.ObjectKey) { e.text(k.GetKind()); e.text(k.GetName()) })
		e.time(r.GetNotAfter())
		if r.GetOwner() != "" {
			e.kind('o')
			e.text(r.GetOwner())
		}
	case *statev1.PendingChange:
		e.kind('W')
		e.text(r.GetId())
		e.bytes(r.GetChange())
		e.texts(r.GetApprovedBy())
		e.time(r.GetNotAfter())
		e.text(r.GetActor())
	case *statev1.ForeignBundle:
		e.kind('F')
		e.text(r.GetTrustDomain())
		e.bytes(r.GetJwks())
		e.number(r.GetSequence())
		e.number(r.GetRevision())
		if r.GetAsFetched() {
			e.kind('f')
		}
		if r.GetGiven() {
			e.kind('g')
		}
		if r.GetAwaitsGiven() {
			e.kind('w')
		}
		if r.GetResetSha256() != "" {
			e.kind('r')
			e.text(r.GetResetSha256())
		}
	default:
		panic(fmt.Sprintf("domain: no encoding for %T", record)) // no table holds it
	}
}

func (e *encoder) object(o *statev1.Object) {
	switch kind := o.GetKind().(type) {
	case *statev1.Object_Service:
		e.kind('s')
		s := kind.Service
		e.text(s.GetName())
		e.text(s.GetPath())
		e.texts(s.GetHosts())
		e.texts(s.GetSelectors())
		e.number(uint64(s.GetPort()))
		e.text(s.GetHealthPath())
		e.number(uint64(s.GetOutboundPort()))
		e.yes(s.GetFailover() != nil)
		e.number(uint64(s.GetFailover().GetMode()))
		e.texts(s.GetFailover().GetOrder())
		e.number(uint64(s.GetFailover().GetFailback()))
		e.number(uint64(s.GetFailover().GetHoldSeconds()))
		e.texts(s.GetExportTo())
		e.texts(s.GetCalls())
		e.number(uint64(s.GetX509SvidSeconds()))
		e.text(s.GetHint())
		e.number(uint64(s.GetJwtSvidSeconds()))
		e.number(uint64(s.GetWitSvidSeconds()))
	case *statev1.Object_Gateway:
		e.kind('g')
		g := kind.Gateway
		e.text(g.GetName())
		e.text(g.GetDatacenter())
		e.text(g.GetAddress())
		e.texts(g.GetHosts())
		e.texts(g.GetSelectors())
	case *statev1.Object_Import:
		e.kind('i')
		e.text(kind.Import.GetService())
	case *statev1.Object_Agreement:
		e.kind('a')
		a := kind.Agreement
		e.text(a.GetName())
		e.text(a.GetPeer())
		e.time(a.GetExpires())
		encodeList(e, a.GetGateways(), (*encoder).peerGateway)
		encodeList(e, a.GetAllow(), (*encoder).allow)
	case *statev1.Object_Relationship:
		e.kind('r')
		r := kind.Relationship
		e.text(r.GetTrustDomain())
		e.texts(r.GetEndpointUrls())
		e.text(r.GetEndpointId())
		e.bytes(r.GetBootstrapBundle())
		e.yes(r.GetWit())
	case *statev1.Object_RoleBinding:
		e.kind('b')
		b := kind.RoleBinding
		e.text(b.GetName())
		e.number(uint64(b.GetRole()))
		e.texts(b.GetSubjects())
		e.texts(b.GetPrefixes())
	case nil:
		e.kind('-')
	default:
		e.laterKind(o)
	}
}

// laterKind writes an object of a kind that has no encoding of its own above. Kinds that are
// added need none.
func (e *encoder) laterKind(o *statev1.Object) {
	e.kind('k')
	e.bytes(ca.AppendRecord(nil, o))
}

func (e *encoder) peerGateway(g *statev1.PeerGateway) {
	e.text(g.GetPath())
	e.text(g.GetDatacenter())
	e.text(g.GetAddress())
}

func (e *encoder) allow(a *statev1.Allow) {
	e.texts(a.GetCallers())
	e.text(a.GetService())
	encodeList(e, a.GetHttp(), func(e *encoder, m *statev1.HTTPMatch) {
		e.texts(m.GetMethods())
		e.number(uint64(m.GetPathType()))
		e.text(m.GetPath())
	})
}

// history remembers the checksums at the last log indexes, so that a Checksum
// command can be compared although others were agreed between its making and its
// turn. It is no part of the state: after a restart it fills again.
type history struct {
	ring [1024]struct {
		index uint64
		sum   [sha256.Size]byte
	}
	next int
}

func (h *history) add(index uint64, sum [sha256.Size]byte) {
	h.ring[h.next].index, h.ring[h.next].sum = index, sum
	h.next = (h.next + 1) % len(h.ring)
}

func (h *history) at(index uint64) (sum [sha256.Size]byte, ok bool) {
	for i := range h.ring {
		if h.ring[i].index == index && index != 0 {
			return h.ring[i].sum, true
		}
	}
	return sum, false
}
