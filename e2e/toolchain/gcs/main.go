// A Google Cloud Storage for tests: the buckets of fake-gcs-server, with what that lacks of the XML API: uploads with
// conditions and in parts, the codes of errors, and the check of who asks.
//
// Two accounts may sign their tokens: the owner may do everything, the stranger nothing. Nobody may use the bucket "open".
package main

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"encoding/xml"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"

	"github.com/fsouza/fake-gcs-server/fakestorage"
)

const open = "open"

type server struct {
	inner   http.Handler
	buckets map[string]bool
	keys    map[string]*rsa.PrivateKey
	lock    sync.Mutex
	uploads map[string]map[int][]byte
}

func main() {
	listen := flag.String("listen", "127.0.0.1:4443", "address")
	folder := flag.String("keys", ".", "folder for the accounts' keys, owner.json and stranger.json")
	buckets := flag.String("buckets", open, "names of buckets, with commas between them")
	flag.Parse()

	fake, err := fakestorage.NewServerWithOptions(fakestorage.Options{NoListener: true, PublicHost: *listen})
	must(err)
	s := &server{
		inner:   fake.HTTPHandler(),
		buckets: map[string]bool{},
		keys:    map[string]*rsa.PrivateKey{},
		uploads: map[string]map[int][]byte{},
	}
	for _, bucket := range strings.Split(*buckets, ",") {
		fake.CreateBucketWithOpts(fakestorage.CreateBucketOpts{Name: bucket})
		s.buckets[bucket] = true
	}
	for _, account := range []string{"owner", "stranger"} {
		s.keys[account], err = rsa.GenerateKey(rand.Reader, 2048)
		must(err)
		must(writeKey(filepath.Join(*folder, account+".json"), account, s.keys[account]))
	}
	log.Fatal(http.ListenAndServe(*listen, s))
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// writeKey writes a key in the form in which Google's console gives it.
func writeKey(path, account string, key *rsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	content, err := json.Marshal(map[string]string{
		"type":           "service_account",
		"client_email":   account,
		"private_key_id": "1",
		"private_key":    string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
	})
	if err != nil {
		return err
	}
	return os.WriteFile(path, content, 0o600)
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	bucket, rawKey, _ := strings.Cut(strings.TrimPrefix(r.URL.EscapedPath(), "/"), "/")
	key, err := url.PathUnescape(rawKey)
	if err != nil {
		fail(w, http.StatusBadRequest, "InvalidURI", err.Error(), "")
		return
	}
	if bucket != open {
		switch account := s.account(r); account {
		case "owner":
		case "":
			fail(w, http.StatusUnauthorized, "AuthenticationRequired", "Authentication required.", "")
			return
		default:
			fail(w, http.StatusForbidden, "AccessDenied", "Access denied.", account+" does not have access to "+bucket+".")
			return
		}
	}
	if !s.buckets[bucket] {
		fail(w, http.StatusNotFound, "NoSuchBucket", "The specified bucket does not exist.", "")
		return
	}
	query := r.URL.Query()
	switch {
	case r.Method == http.MethodPost && query.Has("uploads"):
		s.begin(w, bucket, key)
	case query.Has("uploadId"):
		s.part(w, r, bucket, key, query)
	case r.Method == http.MethodPut:
		body, err := io.ReadAll(r.Body)
		if err != nil {
			fail(w, http.StatusBadRequest, "IncompleteBody", err.Error(), "")
			return
		}
		s.put(w, bucket, key, r.Header.Get("x-goog-if-generation-match"), body)
	case r.Method == http.MethodGet && key != "":
		s.get(w, r)
	default:
		s.inner.ServeHTTP(w, r)
	}
}

// account tells whose token a request bears: a JWT that the account signed itself.
func (s *server) account(r *http.Request) string {
	token := strings.Split(strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "), ".")
	if len(token) != 3 {
		return ""
	}
	var claims struct {
		Issuer string `json:"iss"`
		Scope  string `json:"scope"`
	}
	payload, err := base64.RawURLEncoding.DecodeString(token[1])
	if err != nil || json.Unmarshal(payload, &claims) != nil || !strings.Contains(claims.Scope, "cloud-platform") {
		return ""
	}
	signature, err := base64.RawURLEncoding.DecodeString(token[2])
	key := s.keys[claims.Issuer]
	if err != nil || key == nil {
		return ""
	}
	digest := sha256.Sum256([]byte(token[0] + "." + token[1]))
	if rsa.VerifyPKCS1v15(&key.PublicKey, crypto.SHA256, digest[:], signature) != nil {
		return ""
	}
	return claims.Issuer
}

// get gives an error of fake-gcs-server the code that Google gives it.
func (s *server) get(w http.ResponseWriter, r *http.Request) {
	answer := httptest.NewRecorder()
	s.inner.ServeHTTP(answer, r)
	if answer.Code == http.StatusNotFound {
		fail(w, answer.Code, "NoSuchKey", "The specified key does not exist.", "")
		return
	}
	for name, values := range answer.Header() {
		w.Header()[name] = values
	}
	w.WriteHeader(answer.Code)
	w.Write(answer.Body.Bytes())
}

// put stores an object if it has the wanted generation: 0 where there must be none, any if it is empty.
func (s *server) put(w http.ResponseWriter, bucket, key, generation string, body []byte) bool {
	query := url.Values{"uploadType": {"media"}, "name": {key}}
	if generation != "" {
		query.Set("ifGenerationMatch", generation)
	}
	path := "/upload/storage/v1/b/" + bucket + "/o?" + query.Encode()
	answer := httptest.NewRecorder()
	s.inner.ServeHTTP(answer, httptest.NewRequest(http.MethodPost, path, bytes.NewReader(body)))
	if answer.Code == http.StatusPreconditionFailed {
		fail(w, answer.Code, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold.", "")
		return false
	}
	var object struct{ Etag, Generation string }
	if answer.Code != http.StatusOK || json.Unmarshal(answer.Body.Bytes(), &object) != nil {
		fail(w, http.StatusInternalServerError, "InternalError", answer.Body.String(), "")
		return false
	}
	w.Header().Set("ETag", strconv.Quote(object.Etag))
	w.Header().Set("x-goog-generation", object.Generation)
	return true
}

// begin starts an upload in parts.
func (s *server) begin(w http.ResponseWriter, bucket, key string) {
	s.lock.Lock()
	defer s.lock.Unlock()
	id := rand.Text()
	s.uploads[id] = map[int][]byte{}
	type result struct {
		XMLName               xml.Name `xml:"InitiateMultipartUploadResult"`
		Bucket, Key, UploadId string
	}
	xml.NewEncoder(w).Encode(result{Bucket: bucket, Key: key, UploadId: id})
}

// part takes a part of an upload, puts all parts together, or drops them.
func (s *server) part(w http.ResponseWriter, r *http.Request, bucket, key string, query url.Values) {
	body, err := io.ReadAll(r.Body)
	s.lock.Lock()
	defer s.lock.Unlock()
	id := query.Get("uploadId")
	parts, found := s.uploads[id]
	if err != nil || !found {
		fail(w, http.StatusNotFound, "NoSuchUpload", "The specified upload does not exist.", "")
		return
	}
	switch r.Method {
	case http.MethodPut:
		number, err := strconv.Atoi(query.Get("partNumber"))
		if err != nil {
			fail(w, http.StatusBadRequest, "InvalidArgument", err.Error(), "")
			return
		}
		parts[number] = body
		w.Header().Set("ETag", fmt.Sprintf("\"%x\"", sha256.Sum256(body)))
	case http.MethodDelete:
		delete(s.uploads, id)
		w.WriteHeader(http.StatusNoContent)
	default:
		numbers := []int{}
		for number := range parts {
			numbers = append(numbers, number)
		}
		sort.Ints(numbers)
		whole := []byte{}
		for _, number := range numbers {
			whole = append(whole, parts[number]...)
		}
		delete(s.uploads, id)
		if s.put(w, bucket, key, "", whole) {
			type result struct {
				XMLName xml.Name `xml:"CompleteMultipartUploadResult"`
				ETag    string
			}
			xml.NewEncoder(w).Encode(result{ETag: w.Header().Get("ETag")})
		}
	}
}

// fail answers as the XML API does.
func fail(w http.ResponseWriter, status int, code, message, details string) {
	type failure struct {
		XMLName xml.Name `xml:"Error"`
		Code    string
		Message string
		Details string `xml:",omitempty"`
	}
	w.Header().Set("Content-Type", "application/xml; charset=UTF-8")
	w.WriteHeader(status)
	xml.NewEncoder(w).Encode(failure{Code: code, Message: message, Details: details})
}
