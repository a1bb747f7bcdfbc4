package example;

import static java.nio.charset.StandardCharsets.UTF_8;

import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.ByteBuffer;
import java.time.Duration;
import java.time.Instant;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import org.apache.avro.Schema;
import org.apache.avro.generic.GenericDatumReader;
import org.apache.avro.generic.GenericDatumWriter;
import org.apache.avro.generic.GenericRecord;
import org.apache.avro.generic.GenericRecordBuilder;
import org.apache.avro.io.BinaryEncoder;
import org.apache.avro.io.DecoderFactory;
import org.apache.avro.io.EncoderFactory;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;

/** Puts a picture in, reads it back, and waits for both responses: {@code Photos [BROKER [OPERATIONS RESPONSES]]}. */
public final class Photos {
    private static final Schema OPERATION = schema("operation.avsc");
    private static final Schema RESPONSE = schema("response.avsc");
    private static final List<Schema> BODIES = OPERATION.getField("body").schema().getTypes(); // Insert, Get, Delete, Head
    private static final Duration PATIENCE = Duration.ofSeconds(30);

    private final KafkaProducer<byte[], byte[]> producer;
    private final KafkaConsumer<byte[], byte[]> consumer;
    private final String operations;

    private Photos(String broker, String operations, String responses) {
        Map<String, Object> settings = Map.of("bootstrap.servers", broker, "enable.idempotence", true);
        producer = new KafkaProducer<>(settings, new ByteArraySerializer(), new ByteArraySerializer());
        consumer = new KafkaConsumer<>(
                Map.of("bootstrap.servers", broker, "enable.auto.commit", false, "isolation.level", "read_committed"),
                new ByteArrayDeserializer(), new ByteArrayDeserializer());
        this.operations = operations;
        // Every response from now on: no group, so that this process hears all of them.
        List<TopicPartition> partitions = consumer.partitionsFor(responses).stream()
                .map(one -> new TopicPartition(one.topic(), one.partition())).toList();
        consumer.assign(partitions);
        consumer.seekToEnd(partitions);
        partitions.forEach(consumer::position); // seeking is lazy: this does it
    }

    public static void main(String[] args) throws Exception {
        String broker = args.length > 0 ? args[0] : "127.0.0.1:9092";
        String operations = args.length > 2 ? args[1] : "operations";
        String responses = args.length > 2 ? args[2] : "responses";
        Photos photos = new Photos(broker, operations, responses);

        // 1. An insert. The builder fills in the schema's defaults, of the metadata too.
        GenericRecord insert = new GenericRecordBuilder(BODIES.get(0))
                .set("key", "cat.jpg")
                .set("payload", ByteBuffer.wrap("not really a picture".getBytes(UTF_8)))
                .build();
        GenericRecord inserted = photos.ask("cat.jpg", insert);
        System.out.println("inserted: " + inserted.get("status"));

        // 2. A get of the same object. Get, Delete and Head have the same shape: the schema says which one it is.
        GenericRecord get = new GenericRecordBuilder(BODIES.get(1)).set("key", "cat.jpg").build();
        GenericRecord got = photos.ask("cat.jpg", get);
        GenericRecord result = (GenericRecord) got.get("result");
        if (!result.getSchema().getName().equals("Got")) {
            throw new IllegalStateException(result.get("code") + ": " + result.get("message"));
        }
        GenericRecord object = (GenericRecord) result.get("object"); // null where there is no such object
        System.out.println("got: " + got.get("status") + " " + UTF_8.decode((ByteBuffer) object.get("payload")));

        photos.producer.close();
        photos.consumer.close();
    }

    /** Produces one operation and waits for its response, which has the same {@code request_id}. */
    private GenericRecord ask(String key, GenericRecord body) throws Exception {
        Schema contextSchema = OPERATION.getField("context").schema();
        String requestId = UUID.randomUUID().toString();
        GenericRecord operation = new GenericRecordBuilder(OPERATION)
                .set("context", new GenericRecordBuilder(contextSchema).set("usecase", "photos").build())
                .set("request_id", requestId)
                .set("body", body)
                .build();
        ByteArrayOutputStream value = new ByteArrayOutputStream();
        BinaryEncoder encoder = EncoderFactory.get().binaryEncoder(value, null);
        new GenericDatumWriter<GenericRecord>(OPERATION).write(operation, encoder);
        encoder.flush();
        // The record's key decides its partition, and order holds within one: the same for the same object.
        byte[] recordKey = ("photos/objects/" + key).getBytes(UTF_8);
        producer.send(new ProducerRecord<>(operations, recordKey, value.toByteArray())).get();
        return response(requestId);
    }

    private GenericRecord response(String requestId) throws IOException {
        GenericDatumReader<GenericRecord> reader = new GenericDatumReader<>(RESPONSE);
        Instant deadline = Instant.now().plus(PATIENCE);
        while (Instant.now().isBefore(deadline)) {
            for (ConsumerRecord<byte[], byte[]> record : consumer.poll(Duration.ofMillis(500))) {
                GenericRecord response = reader.read(null, DecoderFactory.get().binaryDecoder(record.value(), null));
                if (response.get("request_id") != null && requestId.contentEquals((CharSequence) response.get("request_id"))) {
                    return response; // those of others, and repeats, are passed over
                }
            }
        }
        throw new IllegalStateException("no response within " + PATIENCE.toSeconds() + " s; is the service running?");
    }

    private static Schema schema(String name) {
        try (InputStream file = Photos.class.getResourceAsStream("/" + name)) {
            return new Schema.Parser().parse(file);
        } catch (IOException error) {
            throw new IllegalStateException(name, error);
        }
    }
}
